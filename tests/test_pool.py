"""The slot pool: its invariants over random sequences of what serving and training do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from harli_appliance.memory.pool import Lease, SlotCounts, SlotPool

SIZE = 60


class FakeSlots:
    """A slot source in which serving and the prefix cache take and free slots at will."""

    def __init__(self) -> None:
        self.size = SIZE
        self.free = list(range(SIZE))
        self.serving: list[int] = []
        self.cached: list[int] = []
        self.wanted = 0

    def counts(self) -> SlotCounts:
        return SlotCounts(len(self.free), len(self.cached), len(self.serving))

    def demand(self) -> int:
        return self.wanted

    def take(self, count: int, *, evict: bool) -> Tensor | None:
        while evict and len(self.free) < count and self.cached:
            self.free.append(self.cached.pop())
        if len(self.free) < count:
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return torch.tensor(taken, dtype=torch.long)

    def give(self, indices: Tensor) -> None:
        self.free += indices.tolist()


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.source = FakeSlots()
        self.pool = SlotPool(self.source, watermark=0.1)
        self.leases: list[Lease] = []
        self.revocations = 0

    @rule(count=st.integers(1, 30))
    def lease(self, count: int) -> None:
        before = self.source.counts()
        lease = self.pool.grant(count, self.on_revoke)
        if lease is None:
            return
        self.leases.append(lease)
        assert len(lease) == count
        left = before.free + before.cached + self.returned - count
        assert left >= self.source.wanted + 6, "the watermark and serving's demand stay untouched"

    @property
    def returned(self) -> int:
        return SIZE - sum(self.held()) - sum(vars_of(self.source.counts()))

    def held(self) -> list[int]:
        return [len(lease) for lease in self.leases]

    def on_revoke(self) -> None:
        self.revocations += 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        lease.release()
        lease.release()
        self.leases.remove(lease)

    @rule(count=st.integers(0, 40))
    def serve(self, count: int) -> None:
        count = min(count, len(self.source.free))
        self.source.serving += [self.source.free.pop() for _ in range(count)]

    @rule(count=st.integers(0, 40), cache=st.booleans())
    def finish(self, count: int, cache: bool) -> None:
        for _ in range(min(count, len(self.source.serving))):
            slot = self.source.serving.pop()
            (self.source.cached if cache else self.source.free).append(slot)

    @rule(wanted=st.integers(0, SIZE))
    def queue(self, wanted: int) -> None:
        self.source.wanted = min(wanted, SIZE - len(self.source.serving))

    @rule()
    def reclaim(self) -> None:
        self.pool.settle()
        shortage = self.pool.shortage()
        for lease in self.pool.revoke(shortage) if shortage else []:
            assert lease.revoked
            lease.release()
            self.leases.remove(lease)
        self.pool.settle()
        counts = self.source.counts()
        assert counts.free + counts.cached >= min(self.source.wanted, SIZE - counts.serving)

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        self.pool.settle()
        owned = [slot for lease in self.leases for slot in lease.indices.tolist()]
        everything = [*self.source.free, *self.source.serving, *self.source.cached, *owned]
        assert sorted(everything) == list(range(SIZE))
        use = self.pool.use()
        assert use.free + use.serving + use.cached + use.leased == use.slots == SIZE
        assert use.leased == len(owned) <= use.leased_max


def vars_of(counts: SlotCounts) -> tuple[int, int, int]:
    return counts.free, counts.cached, counts.serving


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_the_prefix_cache_is_kept_when_policy_says_so() -> None:
    source = FakeSlots()
    source.cached, source.free = source.free[:50], source.free[50:]
    keeping = SlotPool(source, watermark=0.0, evict_cache=False)
    assert keeping.grant(20, lambda: None) is None
    assert len(source.cached) == 50
    evicting = SlotPool(source, watermark=0.0, evict_cache=True)
    lease = evicting.grant(20, lambda: None)
    assert lease is not None
    assert len(source.cached) == 40


def test_a_watermark_must_be_a_share() -> None:
    with pytest.raises(ValueError, match="watermark"):
        SlotPool(FakeSlots(), watermark=1.0)
