"""A job that waits for its turn is stopped; serving does not wait for what that takes."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.memory.pool import SlotPool
from harli_appliance.training.fairness import FirstCome
from harli_appliance.training.trainer import Trainer
from harli_appliance.training.units import WorkUnit
from tests.test_trainer_lanes import Batch, Device, Queue, Slots, fake_run


class TwoJobs(Queue):
    """Jobs a and b; whatever is asked for is written down once the database takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs = [self._job("b"), self._job("a")]
        self.wanted: dict[str, str] = {}
        self.broken = False

    def _job(self, name: str) -> Any:
        return SimpleNamespace(id=name, training_file="file", validation_file=None, priority=1)

    def asked(self, job_id: str) -> Any:
        return self.wanted.get(job_id)

    async def stopped(self, job_id: str) -> Any:
        if self.broken:
            raise ApplianceUnavailable("the database is locked")
        self.wanted.pop(job_id, None)
        return SimpleNamespace(status="paused")

    async def event(self, *_: object) -> Any:
        return None


class Endless(Batch):
    def next_unit(self, window: int, layers: int) -> WorkUnit:
        return WorkUnit("forward", lambda: time.sleep(0.005))


@pytest.mark.parametrize("slow", ["disk", "database"])
async def test_serving_does_not_wait_until_a_waiting_job_is_paused(slow: str) -> None:
    device, queue, pool = Device(), TwoJobs(), SlotPool(Slots(), watermark=0.0)
    lanes = {name: Lane(name) for name in ("training", "inference", "disk")}
    runs: dict[str, Any] = {}

    async def start(job: Any, path: Any, held_out: Any) -> Any:
        runs[job.id] = run = fake_run(device)
        run.job, run.begin, run.drop = job, lambda index, slots: Endless(device), lambda index, batch: 0
        return run

    async def finish(job: Any, run: Any) -> None:
        return None

    trainer = Trainer(
        queue,  # type: ignore[arg-type]
        pool,
        start_job=start,
        finish_job=finish,
        order=FirstCome(),
        max_running=2,
        lane=lanes["training"],
        memory_lane=lanes["inference"],
        disk=lanes["disk"],
        on_change=lambda: None,
    )
    task = asyncio.create_task(trainer.run())
    trainer.units.launch(1 << 30)
    while not any(lease.purpose == "activations" for lease in pool.leases()):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    waiting = runs["b"]
    if slow == "disk":
        waiting.has_unkept_steps, waiting.checkpoint = True, lambda: None
        waiting.write = lambda: time.sleep(1)
    queue.broken = slow == "database"
    queue.wanted["b"] = "pause"
    trainer.units.wake()
    await asyncio.sleep(0.05)
    async with asyncio.timeout(0.5):
        for lease in pool.revoke(1):
            await lease.released()
    queue.broken = False
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for lane in lanes.values():
        lane.close()
