"""The slot pool: who owns which KV-cache slot, leases for training, and reclaim by serving.

Invariants (checked by `check`, by property tests, and by SGLang's own leak check when idle):

- every slot has exactly one owner: free + serving + cached + leased = size;
- serving comes first: a lease is granted only from what admitted and waiting requests cannot ask for, above
  the watermark; when they come to need more, leases are reclaimed and a holder lets go within one work unit;
- no slot is handed out twice, and none is lost when a holder fails.

Threads: `grant`, `settle`, `shortage` and `reclaim` run on the inference lane between steps, where the slot
source may be touched. `Lease.release` may be called from anywhere; its slots return at the next `settle`.
Knows slots and leases; does not know what a lease is for, nor SGLang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    def take(self, count: int, *, evict: bool) -> Tensor | None: ...
    def give(self, indices: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Slots by owner at one moment; free + serving + cached + leased = slots."""

    slots: int
    free: int
    serving: int
    cached: int
    leased: int
    leased_max: int
    reclaims: int


class Lease:
    """Slots held by one holder until `release`.

    `indices` is int64 of shape [slots]. Once `revoked` is true the holder must release at its next unit
    boundary; what lies in the slots is lost.
    """

    def __init__(self, pool: SlotPool, indices: Tensor, on_revoke: Callable[[], None]) -> None:
        self.indices = indices
        self._pool = pool
        self._on_revoke = on_revoke
        self._revoked = False
        self._released = False

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def revoked(self) -> bool:
        return self._revoked

    def _revoke(self) -> None:
        if not self._revoked:
            self._revoked = True
            self._on_revoke()

    def release(self) -> None:
        """Let go of the slots; idempotent."""
        if not self._released:
            self._released = True
            self._pool._returned(self)


class SlotPool:
    """Leases over a `SlotSource`.

    Args:
        watermark: share of all slots that is never leased, in [0, 1).
        evict_cache: whether a lease may drop unused prefix-cache entries. Those speed up later requests that
            share a prefix, so keeping them costs training memory and dropping them costs serving time.
    """

    def __init__(self, source: SlotSource, *, watermark: float, evict_cache: bool = True) -> None:
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark must lie in [0, 1), got {watermark}")
        self._source = source
        self._reserve = int(source.size * watermark)
        self._evict_cache = evict_cache
        self._returns = threading.Condition()
        self._to_settle: list[Lease] = []
        self._held: set[Lease] = set()
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

    def grant(self, count: int, on_revoke: Callable[[], None]) -> Lease | None:
        """Lease `count` slots, or None while serving needs them.

        Args:
            on_revoke: called at most once, from the inference lane, when the lease must be given up.
        """
        self.settle()
        counts = self._source.counts()
        spare = counts.free + (counts.cached if self._evict_cache else 0)
        if spare - self._source.demand() - self._reserve < count:
            return None
        indices = self._source.take(count, evict=self._evict_cache)
        if indices is None:
            return None
        lease = Lease(self, indices, on_revoke)
        self._held.add(lease)
        self._leased += count
        self._leased_max = max(self._leased_max, self._leased)
        return lease

    def settle(self) -> None:
        """Give the slots of released leases back to the source."""
        with self._returns:
            returned, self._to_settle = self._to_settle, []
        for lease in returned:
            self._held.discard(lease)
            self._leased -= len(lease)
            self._source.give(lease.indices)

    def shortage(self) -> int:
        """Slots that serving may ask for and that only leases could supply; 0 when there is enough."""
        if not self._held:
            return 0
        counts = self._source.counts()
        return max(0, min(self._leased, self._source.demand() - counts.free - counts.cached))

    def reclaim(self, slots: int, timeout_s: float = 60.0) -> None:
        """Take back at least `slots` leased slots; returns when they are free, after one work unit at most.

        Raises:
            TimeoutError: a holder did not let go in `timeout_s`, which no work unit takes.
        """
        wanted: list[Lease] = []
        for lease in self._held:
            if sum(map(len, wanted)) >= slots:
                break
            wanted.append(lease)
        for lease in wanted:
            lease._revoke()
        with self._returns:
            if not self._returns.wait_for(lambda: all(lease._released for lease in wanted), timeout_s):
                raise TimeoutError(f"training kept {sum(map(len, wanted))} slots for over {timeout_s:.0f} s")
        self._reclaims += len(wanted)
        self.settle()

    def use(self) -> PoolUse:
        """Who owns what now; call between steps."""
        counts = self._source.counts()
        return PoolUse(
            slots=self.size,
            free=counts.free,
            serving=counts.serving,
            cached=counts.cached,
            leased=self._leased,
            leased_max=self._leased_max,
            reclaims=self._reclaims,
        )

    def _returned(self, lease: Lease) -> None:
        with self._returns:
            self._to_settle.append(lease)
            self._returns.notify_all()
