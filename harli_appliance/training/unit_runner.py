"""Runs work units where the engine wants them, and no more of them than it allows.

Between units everything is on the event loop; units run on the lane that the engine last named. Knows units and
lanes; does not know jobs, nor what the engine decides by.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from harli_appliance.scheduling.types import Outlook, Split
from harli_appliance.training.pace import UnitTimes
from harli_appliance.training.residence import Residence, UnitLane
from harli_appliance.training.units import WorkUnit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ran:
    """A unit that has run.

    Attributes:
        place: how the device was divided meanwhile; None where one lane had all of it.
        fused: whether it was one of those before a serving step, whose size is not the usual one.
    """

    took_ms: float
    place: Split | None
    fused: bool


class UnitRunner:
    """Between the engine, which allows units, and the trainer, which has them.

    Args:
        lane: where units run unless the engine names another, and all other work of training.
        on_change: called when units can run or cannot any more, so that an idle engine looks again.
    """

    def __init__(self, lane: UnitLane, on_change: Callable[[], None]) -> None:
        self.times: defaultdict[str, UnitTimes] = defaultdict(UnitTimes)
        """Of units of the usual size, by kind."""
        self.window: int | None = None
        """Tokens of the forward units that are wanted, which are all layers of these; None for the usual ones."""
        self._home = lane
        self._lane = lane
        self._ran_on = lane
        self._on_change = on_change
        self._place: Split | None = None
        self._allowance = 0
        self._ready = False
        self._units_left = 0
        self._fusible_tokens = 0
        self._changed = asyncio.Event()
        self._spent: asyncio.Future[None] | None = None

    # -- what the engine sees ----------------------------------------------------------------------------

    def outlook(self) -> Outlook:
        """Whether a unit could run now, and the duration of the slowest kind seen (recent average)."""
        slowest = max((times.recent_ms for times in self.times.values()), default=math.nan)
        return Outlook(
            self._ready, slowest, micro_batch_units=self._units_left, fusible_tokens=self._fusible_tokens
        )

    def launch(
        self,
        units: int,
        lane: UnitLane | None = None,
        window: int | None = None,
        place: Split | None = None,
    ) -> Awaitable[None]:
        """Allow `units` work units from now on, replacing what was allowed before.

        Args:
            window: forward units are all layers of a window of so many tokens, where one can begin; None for
                units of the usual size.
            place: how the device is divided while they run; None where one lane has all of it.

        Returns:
            Something to await that is done when they have run, or training has nothing left to run.
        """
        self._allowance = units
        self._lane = lane or self._home
        self.window = window
        self._place = place
        self._end_waiting()
        self._spent = spent = asyncio.get_running_loop().create_future()
        if units <= 0 or not self._ready:
            self._end_waiting()
        self._changed.set()
        return spent

    def wake(self) -> None:
        """The trainer looks again at what is asked of it, also while nothing is allowed."""
        self._changed.set()

    # -- what the trainer does ---------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """What the engine was told: whether a unit can run."""
        return self._ready

    def set_ready(self, ready: bool) -> None:
        """Tell the engine whether a unit can run."""
        changed = ready != self._ready
        self._ready = ready
        if not ready:
            self._end_waiting()
        if changed:
            self._on_change()

    def offer(self, units_left: int, fusible_tokens: int = 0) -> None:
        """What comes next: units to the end of the micro-batch, tokens that a serving step could take along."""
        self._units_left, self._fusible_tokens = units_left, fusible_tokens

    @property
    def allowed(self) -> bool:
        """Whether a unit may start."""
        return self._allowance > 0

    async def change(self) -> None:
        """Wait until the engine allows something else, or somebody wakes the trainer. Nothing runs until then."""
        self._changed.clear()
        self._end_waiting()
        await self._changed.wait()

    async def run(self, unit: WorkUnit, state: Residence) -> Ran:
        """Run an allowed unit of the job whose `state` that is."""
        self._allowance -= 1
        self._fusible_tokens = 0  # until the next one is offered
        fused = self.window is not None
        await self._move_to(self._lane)
        started, place = time.perf_counter(), self._place
        async with state.in_use:
            await self._ran_on.run(unit.run)
        took_ms = 1e3 * (time.perf_counter() - started)
        if not fused:
            self.times[unit.kind].add(took_ms * (place.training if place is not None else 1.0))
        return Ran(took_ms, place, fused)

    async def at_home(self, work: Callable[[], T], state: Residence) -> T:
        """What is no unit: on the training lane, never on the event loop's stream. `state` stays where it is."""
        await self._move_to(self._home)
        async with state.in_use:
            done: T = await self._home.run(work)
        return done

    async def drain(self) -> None:
        """Wait for what the device still has to do."""
        await self._ran_on.drain()

    async def end(self) -> None:
        """What was begun ends, though nobody waits for it any more; nobody may wait for more."""
        self.set_ready(False)
        await self._ran_on.run(_nothing)

    @property
    def unit_ms(self) -> float:
        """What the slowest kind of unit takes, optimizer steps apart; 0 before one has run."""
        return max((times.recent_ms for kind, times in self.times.items() if kind != "step"), default=0.0)

    async def _move_to(self, lane: UnitLane) -> None:
        """Lanes do not wait for each other on the device, so what one began is over before another goes on."""
        if lane is not self._ran_on:
            await self._ran_on.drain()
            self._ran_on = lane

    def _end_waiting(self) -> None:
        """What was allowed has run, or will not."""
        if self._spent is not None and not self._spent.done():
            self._spent.set_result(None)


def _nothing() -> None:
    pass
