"""Watches how long serving waits for slots that training holds: in units of training, and in milliseconds.

Knows pool and units, whose methods it wraps while it watches. Does not know who asks for slots, nor why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from harli_appliance.memory.pool import Lease, Purpose, SlotPool
from harli_appliance.training.units import MicroBatch


@dataclass(frozen=True, slots=True)
class Reclaim:
    """A lease that was taken back.

    Attributes:
        units: of training, that ended until its slots were free; the one in progress counts.
        waited_ms: until then.
    """

    purpose: Purpose
    slots: int
    units: int
    waited_ms: float


@dataclass(slots=True)
class Watch:
    """What was seen so far; `units` have begun."""

    reclaims: list[Reclaim] = field(default_factory=list)
    units: int = 0


@asynccontextmanager
async def watched(pool: SlotPool) -> AsyncIterator[Watch]:
    """Watch every revoked lease of a pool until it is let go, and every unit of any micro-batch."""
    watch, ended = Watch(), 0
    waiting = set[asyncio.Task[None]]()
    run, revoke = MicroBatch._run, pool.revoke

    def counted(batch: MicroBatch, *args: Any) -> None:
        nonlocal ended
        watch.units += 1
        try:
            run(batch, *args)
        finally:
            ended += 1

    async def until_released(lease: Lease, before: int, started: float) -> None:
        await lease.released()
        waited_ms = 1e3 * (time.perf_counter() - started)
        watch.reclaims.append(Reclaim(lease.purpose, len(lease), ended - before, waited_ms))

    def noted(slots: int) -> list[Lease]:
        held = {lease for lease in pool.leases() if not lease.revoked}
        before, started = ended, time.perf_counter()
        wanted = revoke(slots)
        for lease in held.intersection(wanted):
            waiting.add(asyncio.create_task(until_released(lease, before, started)))
        return wanted

    MicroBatch._run = counted  # type: ignore[assignment, method-assign]
    pool.revoke = noted  # type: ignore[method-assign]
    try:
        yield watch
        await asyncio.gather(*waiting)
    finally:
        MicroBatch._run = run  # type: ignore[method-assign]
        del pool.revoke
