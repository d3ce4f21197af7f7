"""What a unit counts as, and who waits for it, whatever the engine wants meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from harli_appliance.scheduling.types import Split
from harli_appliance.training.unit_runner import UnitRunner
from harli_appliance.training.units import WorkUnit

HALF = Split("64+68", 64 / 132, 68 / 132)


class NotingLane:
    """Runs at once, and notes what was asked of it."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self._name, self._asked = name, asked

    async def run(self, work: Any, *args: Any) -> Any:
        self._asked.append(f"run on {self._name}")
        return work(*args)

    async def drain(self) -> None:
        self._asked.append(f"drain {self._name}")


def runner_and_state(asked: list[str]) -> tuple[UnitRunner, Any]:
    units = UnitRunner(NotingLane("training", asked), on_change=lambda: asked.append("changed"))
    return units, SimpleNamespace(in_use=asyncio.Lock())


@pytest.mark.parametrize("before", [None, 64])
async def test_a_unit_is_of_the_size_that_was_wanted_when_it_began(before: int | None) -> None:
    units, state = runner_and_state([])
    units.launch(1, window=before, place=HALF)
    wants_otherwise = lambda: units.launch(1, window=None if before else 64)  # noqa: E731
    ran = await units.run(WorkUnit("forward", wants_otherwise), state)  # type: ignore[arg-type]
    assert (ran.fused, ran.place) == (before is not None, HALF)
    assert units.times.keys() == (set() if before else {"forward"}), (
        "only units of the usual size are compared"
    )
    if not before:
        assert units.times["forward"].recent_ms == pytest.approx(ran.took_ms * HALF.training)


async def test_a_unit_on_another_lane_begins_when_the_device_is_done_on_the_one_before() -> None:
    asked: list[str] = []
    units, state = runner_and_state(asked)
    units.launch(2, NotingLane("inference", asked))
    for _ in range(2):
        await units.run(WorkUnit("forward", lambda: None), state)
    await units.at_home(lambda: None, state)
    assert asked == [
        "drain training", "run on inference", "run on inference", "drain inference", "run on training",
    ]  # fmt: skip
    assert not units.allowed


async def test_nobody_waits_for_units_that_will_not_run() -> None:
    asked: list[str] = []
    units, _ = runner_and_state(asked)
    await asyncio.wait_for(units.launch(5), 1)  # there is nothing to run
    units.set_ready(True)
    await asyncio.wait_for(units.launch(0), 1)
    allowed = asyncio.ensure_future(units.launch(5))
    await asyncio.sleep(0)
    assert not allowed.done()
    units.set_ready(False)
    await asyncio.wait_for(allowed, 1)
    assert asked == ["changed", "changed"]


async def test_who_waits_is_let_go_when_the_trainer_waits_for_more() -> None:
    units, state = runner_and_state([])
    units.set_ready(True)
    allowed = asyncio.ensure_future(units.launch(1))
    await units.run(WorkUnit("forward", lambda: None), state)
    waiting = asyncio.create_task(units.change())
    await asyncio.wait_for(allowed, 1)
    assert not waiting.done()
    units.wake()
    await asyncio.wait_for(waiting, 1)
    assert not units.allowed
