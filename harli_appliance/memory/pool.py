"""The slot pool: who owns which KV-cache slot, leases for training, and reclaim by serving.

Invariants (checked by property tests and by SGLang's own leak check when idle):

- every slot has exactly one owner: free + serving + cached + leased = size;
- serving comes first: a lease is granted only from what admitted and waiting requests cannot ask for, above
  the watermark; when they come to need more, leases are reclaimed and a holder lets go within one work unit;
- no slot is handed out twice, and none is lost when a holder fails.

`grant`, `grant_contiguous`, `grant_spare`, `settle`, `shortage` and `use` run on the inference lane between steps,
where the slot source may be touched; `revoke` and `Lease.release` on the event loop. Released slots return at the
next `settle`. Knows slots and leases; does not know what lies in a lease, nor SGLang.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, cat

Purpose = Literal["outputs", "activations", "adapter"]
"""What a lease is for, which is how dear it is to lose: without kept outputs work goes on more slowly, activations
must be computed again, an adapter's state must be copied away first."""
DEARNESS: dict[Purpose, int] = {"outputs": 0, "activations": 1, "adapter": 2}


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """Slots that the source owns, by state."""

    free: int
    cached: int
    serving: int


class SlotSource(Protocol):
    """Where slots come from; see `harli_appliance.runtime.kv.SglangSlots`."""

    @property
    def size(self) -> int: ...
    def counts(self) -> SlotCounts: ...
    def demand(self) -> int: ...
    def take(self, count: int, *, evict: int) -> Tensor | None:
        """`count` free slots, for which at most `evict` cached ones may be dropped."""
        ...

    def take_contiguous(self, count: int, *, evict: int) -> Tensor | None:
        """The same, with consecutive indices in ascending order."""
        ...

    def give(self, indices: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class LeaseUse:
    """Who holds a lease, for what, and how many slots."""

    holder: str
    purpose: Purpose
    slots: int


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Slots by owner at one moment; free + serving + cached + leased = slots.

    Attributes:
        leases: every lease, the oldest first.
    """

    slots: int
    free: int
    serving: int
    cached: int
    leased: int
    leased_max: int
    reclaims: int
    leases: tuple[LeaseUse, ...] = ()

    @property
    def spared(self) -> int:
        """Slots that hold nothing but kept outputs."""
        return sum(lease.slots for lease in self.leases if lease.purpose == "outputs")


class Lease:
    """Slots held by one holder until `release`.

    `indices` is int64 of shape [slots]. Once `revoked` is true the holder must release at its next unit
    boundary; what it does not copy away before is lost.
    """

    def __init__(
        self,
        indices: Tensor,
        holder: str,
        purpose: Purpose,
        on_revoke: Callable[[], None],
        on_release: Callable[[Lease], None],
    ):
        self.indices = indices
        self.holder = holder
        self.purpose = purpose
        self.revoked = False
        self._on_revoke = on_revoke
        self._on_release = on_release
        self._released = asyncio.Event()

    def __len__(self) -> int:
        return len(self.indices)

    def revoke(self) -> None:
        """Ask the holder to let go; idempotent."""
        if not self.revoked:
            self.revoked = True
            self._on_revoke()

    def release(self) -> None:
        """Let go of the slots; idempotent."""
        if not self._released.is_set():
            self._released.set()
            self._on_release(self)

    async def released(self) -> None:
        """Wait until the holder has let go."""
        await self._released.wait()


class SlotPool:
    """Leases over a `SlotSource`.

    Args:
        watermark: share of all slots that is never leased, in [0, 1).
        keep_free: share of all slots that is left free when leases are granted for kept outputs, in [0, 1].
        keep_cached: share of all slots up to which unused prefix-cache entries are kept from leases, in [0, 1].
            They speed up later requests that share a prefix: keeping them costs training memory, dropping
            them costs serving time. Serving itself evicts what it needs, whatever this says.
    """

    def __init__(
        self, source: SlotSource, *, watermark: float, keep_cached: float = 0.0, keep_free: float = 0.0
    ) -> None:
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark must lie in [0, 1), got {watermark}")
        if not 0.0 <= keep_cached <= 1.0:
            raise ValueError(f"keep_cached must lie in [0, 1], got {keep_cached}")
        if not 0.0 <= keep_free <= 1.0:
            raise ValueError(f"keep_free must lie in [0, 1], got {keep_free}")
        self._source = source
        self._keep_free = int(source.size * keep_free)
        self._reserve = int(source.size * watermark)
        self._keep_cached = int(source.size * keep_cached)
        self._lock = threading.Lock()
        self._returned: list[Lease] = []
        self._held: dict[Lease, None] = {}  # in the order of their granting
        self._leased = 0
        self._leased_max = 0
        self._reclaims = 0

    @property
    def size(self) -> int:
        return self._source.size

    @property
    def leasable(self) -> int:
        """The most that can ever be leased at once, with nothing served."""
        return self._source.size - self._reserve

    def grant(
        self,
        count: int,
        on_revoke: Callable[[], None],
        *,
        holder: str = "",
        purpose: Purpose = "activations",
    ) -> Lease | None:
        """Lease any `count` slots, or None while serving needs them.

        Args:
            on_revoke: called on the event loop, at most once, when the lease must be given up.
            holder: whose lease it is, for the ledger.
        """
        return self._grant(self._source.take, count, on_revoke, holder, purpose)

    def grant_contiguous(
        self,
        count: int,
        on_revoke: Callable[[], None],
        *,
        holder: str = "",
        purpose: Purpose = "adapter",
    ) -> Lease | None:
        """Lease `count` slots with consecutive indices; None while serving needs them or no run is that long."""
        return self._grant(self._source.take_contiguous, count, on_revoke, holder, purpose)

    def grant_spare(
        self, count: int, most: int, on_revoke: Callable[[], None], *, holder: str = ""
    ) -> list[Lease]:
        """Up to `most` leases of any `count` slots each for kept outputs, of slots that nobody needs: `keep_free`
        and the prefix cache are left alone."""
        self.settle()
        spare = self._spare(self._source.counts(), evictable=0)
        number = max(0, min(most, (spare - max(self._reserve, self._keep_free)) // max(count, 1)))
        indices = self._source.take(number * count, evict=0) if number else None
        if indices is None:
            return []
        parts = (indices[at : at + count] for at in range(0, len(indices), count))
        return [self._lease(part, holder, "outputs", on_revoke) for part in parts]

    def _grant(
        self,
        take: Callable[..., Tensor | None],
        count: int,
        on_revoke: Callable[[], None],
        holder: str,
        purpose: Purpose,
    ) -> Lease | None:
        self.settle()
        counts = self._source.counts()
        evictable = max(0, counts.cached - self._keep_cached)
        if self._spare(counts, evictable) - self._reserve < count:
            return None
        indices = take(count, evict=evictable)
        if indices is None:
            return None
        return self._lease(indices, holder, purpose, on_revoke)

    def _spare(self, counts: SlotCounts, evictable: int) -> int:
        """Slots that serving cannot ask for. It may take every cached one, so its demand is held against those
        before free ones."""
        return min(counts.free + evictable, counts.free + counts.cached - self._source.demand())

    def _lease(self, indices: Tensor, holder: str, purpose: Purpose, on_revoke: Callable[[], None]) -> Lease:
        lease = Lease(indices, holder, purpose, on_revoke, self._take_back)
        with self._lock:
            self._held[lease] = None
            self._leased += len(indices)
            self._leased_max = max(self._leased_max, self._leased)
        return lease

    def settle(self) -> None:
        """Give the slots of released leases back to the source."""
        with self._lock:
            returned, self._returned = self._returned, []
            for lease in returned:
                del self._held[lease]
            self._leased -= sum(map(len, returned))
        if returned:
            self._source.give(cat([lease.indices for lease in returned]))

    def shortage(self) -> int:
        """Slots that serving may ask for and that only leases could supply; 0 when there is enough."""
        if not self._held:
            return 0
        counts = self._source.counts()
        return max(0, min(self._leased, self._source.demand() - counts.free - counts.cached))

    def revoke(self, slots: int) -> list[Lease]:
        """Ask holders of at least `slots` slots to let go; await `Lease.released` of what is returned.

        What is least dear goes first: leases that are on their way back already, then kept outputs, then
        activations, then adapters, of each the newest first (the least work is in it).
        """
        wanted: list[Lease] = []
        with self._lock:
            newest = list(reversed(self._held))
            for lease in sorted(newest, key=lambda lease: (not lease.revoked, DEARNESS[lease.purpose])):
                if sum(map(len, wanted)) >= slots:
                    break
                wanted.append(lease)
            self._reclaims += len({lease.purpose for lease in wanted if not lease.revoked})
        for lease in wanted:
            lease.revoke()
        return wanted

    def leases(self) -> tuple[Lease, ...]:
        """Those that are held, the oldest first."""
        with self._lock:
            return tuple(self._held)

    def use(self) -> PoolUse:
        """Who owns what now."""
        counts = self._source.counts()
        with self._lock:
            leases = tuple(LeaseUse(lease.holder, lease.purpose, len(lease)) for lease in self._held)
        return PoolUse(
            slots=self.size,
            free=counts.free,
            serving=counts.serving,
            cached=counts.cached,
            leased=self._leased,
            leased_max=self._leased_max,
            reclaims=self._reclaims,
            leases=leases,
        )

    def _take_back(self, lease: Lease) -> None:
        with self._lock:
            self._returned.append(lease)
