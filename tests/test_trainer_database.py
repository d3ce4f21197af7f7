"""The trainer when the database cannot be written: jobs go on, and nobody waits for what is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.memory.pool import SlotPool
from tests.test_trainer_lanes import Batch, Device, DeviceLane, Queue, Slots, fake_run, train, trainer_of


class Locked(Queue):
    """Its database cannot be written for the first so many calls of some methods."""

    def __init__(self, **failures: int) -> None:
        super().__init__()
        self._row = self.jobs[0]
        self._failures = failures
        self.told: list[str] = []
        self.look: Callable[[str], None] = lambda _: None

    def _write(self, what: str) -> None:
        if self._failures.get(what):
            self._failures[what] -= 1
            self.told.append(f"{what} refused")
            self.look(what)
            raise ApplianceUnavailable("the database is locked")
        self.told.append(what)

    async def next_job(self) -> Any:
        if self.jobs:
            self._write("next_job")
        return await super().next_job()

    async def begun(self, *progress: object) -> Any:
        self._write("begun")
        return self._row

    async def progress(self, *_: object) -> None:
        self._write("progress")

    async def stopped(self, job_id: str) -> Any:
        self._write("stopped")
        self.jobs.append(self._row)
        return SimpleNamespace(status="queued")

    async def fail(self, job_id: str, code: str, message: str) -> None:
        self._write("fail")
        self.done.set()


@pytest.fixture
def _asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORE_RETRY_S", "PUT_BACK_S"):
        monkeypatch.setattr(f"harli_appliance.training.trainer.{name}", 0.001)


@pytest.mark.usefixtures("_asked_again_soon")
@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({"next_job": 3}, [*["next_job refused"] * 3, "next_job", "begun", "progress"]),
        (
            {"begun": 1, "stopped": 2},
            [
                *["next_job", "begun refused", "stopped refused", "stopped refused", "stopped"],
                *["next_job", "begun", "progress"],
            ],
        ),
        (
            {"progress": 2, "stopped": 1},
            [
                *["next_job", "begun", "progress refused", "stopped refused", "stopped"],
                *["next_job", "begun", "progress refused", "stopped"],
                *["next_job", "begun", "progress"],
            ],
        ),
    ],
    ids=["none can be taken", "none can begin", "none can be written down"],
)
async def test_a_job_goes_on_once_the_database_can_be_used_again(
    failures: dict[str, int], told: list[str]
) -> None:
    device, queue = Device(), Locked(**failures)
    lane, pool = DeviceLane("training", device, ahead=0), SlotPool(Slots(), watermark=0.0)
    await train(trainer_of(queue, pool, lambda: fake_run(device), lane), queue, lane=lane)
    assert queue.told == told
    pool.settle()
    assert pool.leases() == (), "a job that is put back holds nothing"


@pytest.mark.usefixtures("_asked_again_soon")
async def test_nobody_waits_for_units_while_the_database_is_locked() -> None:
    device, queue = Device(), Locked(progress=1, stopped=4)
    lane, pool = DeviceLane("training", device, ahead=0), SlotPool(Slots(), watermark=0.0)
    trainer = trainer_of(queue, pool, lambda: fake_run(device), lane)
    ready: list[bool] = []
    queue.look = lambda what: ready.append(trainer.units.outlook().ready)
    await train(trainer, queue, lane=lane)
    assert ready == [False] * 5, "also while the first attempt waits, which takes seconds"


@pytest.mark.usefixtures("_asked_again_soon")
async def test_a_job_that_fails_is_failed_once_the_database_can_be_used_again() -> None:
    device, queue = Device(), Locked(fail=3)
    lane, pool = DeviceLane("training", device, ahead=0), SlotPool(Slots(), watermark=0.0)
    run = fake_run(device)

    def begin(index: int, slots: Tensor) -> Batch:
        raise RuntimeError("out of memory")

    run.begin = begin
    trainer = trainer_of(queue, pool, run, lane)
    await train(trainer, queue, lane=lane)
    assert queue.told == ["next_job", "begun", *["fail refused"] * 3, "fail"]
    assert not trainer.units.outlook().ready
    assert trainer.state().running == ()
