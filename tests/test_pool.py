"""The slot pool: its invariants over random sequences of what serving and training do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harli_appliance.memory.pool import Lease, Purpose, SlotPool
from harli_appliance.training.adapter_state import AdapterState
from tests.radix_slots import MARGIN, RadixSlots, Request

SIZE = 60


WIDTH = 8


class Trained:
    """The state of an adapter of one parameter, and the same parameter trained in ordinary memory."""

    def __init__(self) -> None:
        self.rows = torch.full((SIZE, WIDTH), float("nan"))
        self.lease: Lease | None = None
        values = torch.arange(12.0).view(3, 4)
        self._here, self._there = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
        self._optimizers = [torch.optim.AdamW([each], lr=0.1) for each in (self._here, self._there)]
        self.state = AdapterState([[self._here]], self._optimizers[0], [self.rows])
        self.slots = self.state.slots

    def train(self, seed: int) -> None:
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        self.state.gradients(0)[0].add_(gradient)
        self._there.grad = gradient
        for optimizer in self._optimizers:
            optimizer.step()
        self.state.begin_step()

    def park(self) -> None:
        assert self.lease is not None
        self.state.park()
        self.lease.release()
        self.lease = None

    def others_write(self, slots: list[int]) -> None:
        """What serving and micro-batches do with the slots that are theirs."""
        self.rows[torch.tensor(slots, dtype=torch.long)] = float("nan")

    @property
    def whole(self) -> bool:
        return torch.equal(self._here, self._there)


class PoolMachine(RuleBasedStateMachine):
    """Serving (submit, tick, finish, cancel, evict) and holders (lease, release, crash; an adapter that is
    trained, placed and parked) in any order."""

    @initialize(
        watermark=st.sampled_from([0.0, 0.1]),
        keep=st.sampled_from([0.0, 0.2, 1.0]),
        keep_free=st.sampled_from([0.0, 0.25]),
    )
    def build(self, watermark: float, keep: float, keep_free: float) -> None:
        self.source = RadixSlots(SIZE)
        self.reserve, self.keep = int(SIZE * watermark), int(SIZE * keep)
        self.keep_free = int(SIZE * keep_free)
        self.pool = SlotPool(self.source, watermark=watermark, keep_cached=keep, keep_free=keep_free)
        self.leases: list[Lease] = []
        self.trained = Trained()

    # -- training ------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 30), contiguous=st.booleans())
    def lease(self, count: int, contiguous: bool) -> None:
        self.pool.settle()
        before = self.source.counts()
        purpose: Purpose = "adapter" if contiguous else "activations"
        grant = self.pool.grant_contiguous if contiguous else self.pool.grant
        lease = grant(count, lambda: None, holder="job", purpose=purpose)
        if lease is None:
            return
        self.leases.append(lease)
        slots = lease.indices.tolist()
        assert len(lease) == count == len(set(slots))
        if contiguous:
            assert slots == list(range(slots[0], slots[0] + count))
        left = self.source.counts()
        assert left.free + left.cached >= self.source.demand() + self.reserve
        dropped = before.cached - left.cached
        longest = max((len(entry) for entry in self.source.cache), default=0) + SIZE * (dropped > 0)
        assert left.cached >= min(before.cached, self.keep) - longest, "entries are dropped whole, no more"
        assert dropped == 0 or self.keep < SIZE

    @rule(count=st.integers(1, 9), most=st.integers(1, 5))
    def lease_spare(self, count: int, most: int) -> None:
        self.pool.settle()
        before = self.source.counts()
        leases = self.pool.grant_spare(count, most, lambda: None, holder="job")
        self.leases += leases
        slots = [slot for lease in leases for slot in lease.indices.tolist()]
        assert len(slots) == len(set(slots)) == count * len(leases) <= count * most
        left = self.source.counts()
        assert left.cached == before.cached, "nothing is dropped for what can be spared"
        assert not leases or left.free >= max(self.keep_free, self.reserve)
        assert not leases or left.free + left.cached >= self.source.demand() + max(
            self.keep_free, self.reserve
        )

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release_or_crash(self, data: st.DataObject, twice: bool) -> None:
        """A holder that ends or fails lets go in its `finally`, perhaps once more than needed."""
        lease = data.draw(st.sampled_from(self.leases))
        lease.release()
        if twice:
            lease.release()
        self.leases.remove(lease)

    @precondition(lambda self: self.trained.lease is None)
    @rule()
    def place(self) -> None:
        lease = self.pool.grant_contiguous(self.trained.slots, lambda: None, holder="state")
        if lease is not None:
            self.trained.lease = lease
            self.trained.state.place(lease.indices)

    @precondition(lambda self: self.trained.lease is not None)
    @rule()
    def park(self) -> None:
        self.trained.park()

    @rule(seed=st.integers(0, 2**16))
    def train(self, seed: int) -> None:
        self.trained.train(seed)

    # -- serving -------------------------------------------------------------------------------------------

    @rule(prompt=st.integers(1, 40), answer=st.integers(1, 30))
    def submit(self, prompt: int, answer: int) -> None:
        if prompt + answer + MARGIN <= SIZE:
            self.source.waiting.append(Request(prompt, answer))

    @rule()
    def tick(self) -> None:
        """As the engine does it: settle, reclaim what is short, then SGLang plans and decodes."""
        self.pool.settle()
        shortage = self.pool.shortage()
        for lease in self.pool.revoke(shortage) if shortage else []:
            assert lease.revoked
            if lease is self.trained.lease:
                self.trained.park()
            else:
                lease.release()
                self.leases.remove(lease)
        self.pool.settle()
        assert self.pool.shortage() == 0
        self.source.admit()
        if self.source.waiting and not self.source.running:
            head = self.source.waiting[0]
            raise AssertionError(f"{head} fits the pool and waits for memory that training holds")
        assert self.source.decode(), "a running request got no slot for its next token"

    @precondition(lambda self: self.source.running)
    @rule(data=st.data(), cache=st.booleans())
    def finish(self, data: st.DataObject, cache: bool) -> None:
        self.source.end(data.draw(st.sampled_from(self.source.running)), cache=cache)

    @precondition(lambda self: self.source.waiting)
    @rule()
    def cancel_waiting(self) -> None:
        self.source.waiting.pop()

    @rule(count=st.integers(1, 40))
    def evict(self, count: int) -> None:
        self.source.evict(count)

    # -- always --------------------------------------------------------------------------------------------

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.settle()
        source = self.source
        owned = [slot for lease in self.leases for slot in lease.indices.tolist()]
        state = self.trained.lease.indices.tolist() if self.trained.lease is not None else []
        served = [slot for request in source.running for slot in (*request.slots, *(request.cached or ()))]
        cached = [slot for entry in source.cache for slot in entry]
        assert sorted([*source.free, *served, *cached, *owned, *state]) == list(range(SIZE))
        self.trained.others_write([*source.free, *served, *cached, *owned])
        assert self.trained.whole, "the state of the adapter is not what it was"
        use = self.pool.use()
        assert use.free + use.serving + use.cached + use.leased == use.slots == SIZE
        assert (
            use.leased
            == len(owned) + len(state)
            == sum(lease.slots for lease in use.leases)
            <= use.leased_max
        )

    def teardown(self) -> None:
        """Whatever happened, when all have ended every slot is free again."""
        if not hasattr(self, "pool"):
            return
        for lease in self.leases:
            lease.release()
        if self.trained.lease is not None:
            self.trained.park()
        self.pool.settle()
        for request in list(self.source.running):
            self.source.end(request, cache=False)
        self.source.evict(SIZE)
        assert sorted(self.source.free) == list(range(SIZE))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=2000, stateful_step_count=20, deadline=None)


def cached_pool(keep: float) -> tuple[RadixSlots, SlotPool]:
    """50 of 60 slots cached in entries of five."""
    source = RadixSlots(SIZE)
    source.cache = [source.free[at : at + 5] for at in range(0, 50, 5)]
    source.free = source.free[50:]
    return source, SlotPool(source, watermark=0.0, keep_cached=keep)


@pytest.mark.parametrize(("keep", "most"), [(1.0, 10), (0.5, 30), (0.0, 60)])
def test_the_prefix_cache_is_kept_as_far_as_policy_says(keep: float, most: int) -> None:
    source, pool = cached_pool(keep)
    assert pool.grant(most + 1, lambda: None) is None
    assert sum(map(len, source.cache)) == 50
    lease = pool.grant(most, lambda: None)
    assert lease is not None
    assert sum(map(len, source.cache)) == SIZE - most


def test_activations_are_revoked_before_adapters_and_the_newest_first() -> None:
    pool = SlotPool(RadixSlots(SIZE), watermark=0.0)
    revoked: list[str] = []

    def lease(name: str, purpose: Purpose) -> Lease:
        made = pool.grant(10, lambda: revoked.append(name), holder=name, purpose=purpose)
        assert made is not None
        return made

    older, adapter, newer = lease("a", "activations"), lease("b", "adapter"), lease("c", "activations")
    assert [use.holder for use in pool.use().leases] == ["a", "b", "c"]
    assert pool.revoke(10) == [newer]
    assert pool.revoke(10) == [newer], "what is on its way back counts"
    assert pool.revoke(11) == [newer, older]
    assert pool.revoke(21) == [newer, older, adapter]
    assert revoked == ["c", "a", "b"]
    assert pool.use().reclaims == 3


def test_kept_outputs_are_revoked_before_everything_else() -> None:
    pool = SlotPool(RadixSlots(SIZE), watermark=0.0, keep_free=0.25)
    older, newer = pool.grant_spare(10, 2, lambda: None)
    activations = pool.grant(10, lambda: None)
    assert pool.revoke(20) == [newer, older]
    assert pool.use().reclaims == 1, "taken back once"
    assert pool.revoke(25) == [newer, older, activations]


@pytest.mark.parametrize(("keep_free", "leases"), [(0.0, 6), (0.25, 4), (0.9, 0), (1.0, 0)])
def test_kept_outputs_leave_free_what_they_must(keep_free: float, leases: int) -> None:
    pool = SlotPool(RadixSlots(SIZE), watermark=0.0, keep_free=keep_free)
    assert len(pool.grant_spare(10, 100, lambda: None)) == leases


def test_a_holder_is_awaited_until_it_lets_go() -> None:
    import asyncio

    async def scenario() -> None:
        pool = SlotPool(RadixSlots(SIZE), watermark=0.0)
        lease = pool.grant(5, lambda: None)
        assert lease is not None
        waiting = asyncio.create_task(lease.released())
        await asyncio.sleep(0)
        assert not waiting.done()
        lease.release()
        await waiting

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "shares", [{"watermark": 1.0}, {"watermark": 0.0, "keep_cached": 1.5}, {"watermark": 0, "keep_free": -1}]
)
def test_shares_are_shares(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        SlotPool(RadixSlots(SIZE), **shares)


def test_indices_are_torch_indices() -> None:
    lease = SlotPool(RadixSlots(SIZE), watermark=0.0).grant_contiguous(7, lambda: None)
    assert lease is not None
    assert lease.indices.dtype == torch.int64
    assert lease.purpose == "adapter"
