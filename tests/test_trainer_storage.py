"""Jobs on a disk that is full or cannot be read for a while: they go on, and lose nothing."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.memory.pool import SlotPool
from tests.test_trainer_lanes import Device, DeviceLane, Queue, Slots, fake_run, train, trainer_of


class Telling(Queue):
    def __init__(self) -> None:
        super().__init__()
        self._row = self.jobs[0]
        self.told: list[str] = []
        self.asking: str | None = None

    def asked(self, job_id: str) -> Any:
        return self.asking

    async def event(self, job_id: str, level: str, message: str) -> None:
        self.told.append(f"{level}: {message}")

    async def stopped(self, job_id: str) -> Any:
        self.told.append("stopped")
        if self.asking is not None:
            self.done.set()
            return SimpleNamespace(status="paused")
        self.jobs.append(self._row)
        return SimpleNamespace(status="queued")


def full(what: str = "the disk is full") -> None:
    raise ApplianceUnavailable(what, code="storage_unavailable")


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harli_appliance.training.trainer.PUT_BACK_S", 0.001)


def steps_of(run: Any, device: Device, steps: int) -> None:
    """Let a run make so many steps, each of which is due to be kept."""

    def end_round() -> None:
        run.step += 1
        run.checkpoint_due = run.has_unkept_steps = True
        run.done = run.step == steps
        device.happened.append(f"step {run.step}")

    run.end_round = end_round
    run.checkpoint = lambda: device.happened.append("checkpoint")


async def test_a_job_goes_on_while_no_checkpoint_can_be_written() -> None:
    device, queue = Device(), Telling()
    run = fake_run(device)
    steps_of(run, device, 3)
    run.write = lambda: full() if run.step < 3 else device.happened.append("written")
    lane = DeviceLane("training", device, ahead=0)
    await train(trainer_of(queue, SlotPool(Slots(), watermark=0.0), run, lane), queue, lane=lane)
    happened = [what for what in device.happened if what not in ("begin", "unit", "finish")]
    assert happened == [
        *("step 1", "checkpoint", "step 2", "checkpoint", "step 3", "checkpoint"),
        *("written", "written"),
    ]
    assert queue.told == ["warn: the disk is full"], "once, as it is one outage"


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("what", ["write", "finish"])
async def test_the_end_of_a_job_is_tried_until_there_is_room(what: str) -> None:
    device, queue, tries = Device(), Telling(), []
    run = fake_run(device)
    lane = DeviceLane("training", device, ahead=0)

    def refused() -> None:
        tries.append(what)
        if len(tries) < 4:
            full()

    async def finish(job: Any, run: Any) -> None:
        if what == "finish":
            refused()
        queue.done.set()

    if what == "write":
        run.write = refused
    trainer = trainer_of(queue, SlotPool(Slots(), watermark=0.0), run, lane)
    trainer._finish_job = finish
    await train(trainer, queue, lane=lane)
    assert len(tries) == 4
    assert queue.told == ["warn: the disk is full"]
    assert device.happened.count("step") == 1, "nothing is trained again"


async def test_a_job_that_waits_for_room_to_end_can_be_paused() -> None:
    device, queue = Device(), Telling()
    run = fake_run(device)
    lane = DeviceLane("training", device, ahead=0)

    async def finish(job: Any, run: Any) -> None:
        queue.asking = "pause"
        full()

    trainer = trainer_of(queue, SlotPool(Slots(), watermark=0.0), run, lane)
    trainer._finish_job = finish
    await train(trainer, queue, lane=lane)
    assert queue.told == ["warn: the disk is full", "stopped"]


async def test_a_pause_on_a_full_disk_is_warned_of_again() -> None:
    device, queue = Device(), Telling()
    run = fake_run(device)
    steps_of(run, device, 3)

    def write() -> None:
        queue.asking = "pause"
        full()

    run.write = write
    lane = DeviceLane("training", device, ahead=0)
    await train(trainer_of(queue, SlotPool(Slots(), watermark=0.0), run, lane), queue, lane=lane)
    assert queue.told == ["warn: the disk is full"] * 2 + ["stopped"]


async def test_a_job_whose_file_cannot_be_read_waits_and_does_not_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, queue, begun = Device(), Telling(), []
    lane = DeviceLane("training", device, ahead=0)
    monkeypatch.setattr("harli_appliance.training.trainer.PUT_BACK_S", 0.1)

    def run() -> Any:
        begun.append(asyncio.get_running_loop().time())
        if len(begun) < 3:
            full("too many open files")
        return fake_run(device)

    await train(trainer_of(queue, SlotPool(Slots(), watermark=0.0), run, lane), queue, lane=lane)
    assert queue.told == ["warn: too many open files", "stopped"] * 2
    assert min(later - earlier for earlier, later in pairwise(begun)) >= 0.1
