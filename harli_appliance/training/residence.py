"""Where the adapter state of a running job lives: in leased slots while the pool grants them, else on the host.

When serving needs the slots, the state is parked as soon as the unit in progress has ended, whatever the trainer
is doing meanwhile; the trainer finds it gone at the next unit boundary and settles it again when the pool allows.
Lives on the event loop. Knows leases and lanes; does not know what a state consists of, nor jobs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from harli_appliance.memory.pool import Lease, SlotPool


class UnitLane(Protocol):
    """Where work runs; see `harli_appliance.engine.lanes.Lane`."""

    async def run(self, function: Callable[..., Any], *args: Any) -> Any: ...
    async def drain(self) -> None:
        """Wait for what the device still has to do of what was run."""
        ...


class Movable(Protocol):
    """What can live in either place; see `harli_appliance.training.adapter_state.AdapterState`."""

    @property
    def slots(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def place(self, slots: Tensor) -> None: ...
    def park(self) -> None: ...


class Residence:
    """Moves one state in and out.

    Args:
        holder: whose state it is, for the pool's ledger.
        lane: where bytes are copied; nothing else may use the state there at the same time.
        memory_lane: the inference lane, on which the pool may be asked for slots.
        drained: waits until no other lane works with the state on the device any more.
        on_leave: called when the state must leave, so that the holder looks.
        on_copy: called with bytes and milliseconds of a move.
    """

    def __init__(
        self,
        state: Movable,
        pool: SlotPool,
        *,
        holder: str,
        lane: UnitLane,
        memory_lane: UnitLane,
        drained: Callable[[], Awaitable[None]],
        on_leave: Callable[[], None],
        on_copy: Callable[[int, float], None] = lambda size, took_ms: None,
    ) -> None:
        self.in_use = asyncio.Lock()
        """Held by whoever uses the state, e.g. for the time of a unit: it does not move meanwhile."""
        self._state = state
        self._pool = pool
        self._holder = holder
        self._slots = state.slots
        self._lane = lane
        self._memory_lane = memory_lane
        self._drained = drained
        self._on_leave = on_leave
        self._on_copy = on_copy
        self._lease: Lease | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._lost: Exception | None = None

    def require(self) -> None:
        """
        Raises:
            Exception: what went wrong when the state was parked, as which it is lost.
        """
        if self._lost is not None:
            raise self._lost

    @property
    def settled(self) -> bool:
        """Whether the state lies in the pool and may stay there."""
        return self._lease is not None and not self._lease.revoked

    async def settle(self) -> bool:
        """Place the state if the pool grants the slots now; whether it is settled.

        Raises:
            Exception: what went wrong when the state was parked earlier; it is lost.
        """
        if self._leaving is not None:
            await asyncio.wait([self._leaving])
        self.require()
        async with self.in_use:
            if self._lease is None:
                grant = partial(
                    self._pool.grant_contiguous,
                    self._slots,
                    self._must_leave,
                    holder=self._holder,
                    purpose="adapter",
                )
                self._lease = await self._memory_lane.run(grant)
                if self._lease is not None:
                    try:
                        await self._copy(self._state.place, self._lease.indices)
                    except BaseException:
                        self._let_go()
                        raise
        return self.settled

    async def leave(self) -> None:
        """Park the state and give its slots back."""
        async with self.in_use:
            if self._lease is None:
                return
            try:
                await self._copy(self._state.park)
            except Exception as error:
                self._lost = error  # it lies in slots that become another's
                raise
            finally:
                self._let_go()

    async def _copy(self, move: Callable[..., None], *args: Tensor) -> None:
        def timed() -> float:
            started = time.perf_counter()
            move(*args)
            return 1e3 * (time.perf_counter() - started)

        await self._drained()
        try:
            self._on_copy(self._state.bytes, await self._lane.run(timed))
        finally:
            await self._lane.drain()  # units may run on another lane, and given back rows become another's

    def _let_go(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _must_leave(self) -> None:
        self._leaving = asyncio.create_task(self.leave())
        self._leaving.add_done_callback(lambda task: task.cancelled() or task.exception())  # `require` tells
        self._on_leave()
