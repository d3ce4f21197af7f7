"""The trainer coroutine: takes jobs from the queue and runs their work units when the engine allows it.

Between units it is on the event loop; units run on the lane that the engine last named. It starts a unit only
within its allowance, and gives up its lease at the next unit boundary when serving takes the slots back. Knows
jobs, units and leases; does not know partitions, policies or HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from harli_appliance.api.ports import Job
from harli_appliance.errors import HarliError
from harli_appliance.memory.pool import Lease, SlotPool
from harli_appliance.scheduling.types import Outlook
from harli_appliance.training.job_run import JobRun
from harli_appliance.training.residence import Residence, UnitLane
from harli_appliance.training.units import WorkUnit

log = structlog.get_logger(__name__)

LEASE_RETRY_S = 0.02
"""How long to wait before asking again for slots that serving may need now."""


class JobSource(Protocol):
    """The queue as the trainer sees it; see `harli_appliance.training.queue.JobQueue`."""

    async def next_job(self) -> Job | None: ...
    async def wait_for_job(self) -> None: ...
    async def file_path(self, file_id: str) -> Path: ...
    async def progress(
        self, job_id: str, step: int, total_steps: int, trained_tokens: int, loss: float | None
    ) -> None: ...
    def cancel_requested(self, job_id: str) -> bool: ...
    async def finish_cancelled(self, job_id: str) -> Job: ...
    async def fail(self, job_id: str, code: str, message: str) -> Job: ...


class Cancelled(Exception):
    """The job was cancelled by a person; raised at a unit boundary."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What the dashboard shows. `tokens` counts tokens whose backward pass is done and was not dropped."""

    tokens: int
    job: str | None
    step: int | None
    total_steps: int | None
    loss: float | None
    dropped_micro_batches: int


class Trainer:
    """Runs one job at a time.

    Args:
        start_job: builds the run of a job (adapter, data, optimizer); called on the training lane.
        finish_job: takes over the finished adapter (serving it, recording it) and ends the job.
        memory_lane: the inference lane, on which the pool may be asked for slots.
        on_change: called when training begins or ceases to have work, so that an idle engine looks again.
        on_step: called with the loss of every optimizer step.
    """

    def __init__(
        self,
        queue: JobSource,
        pool: SlotPool,
        *,
        start_job: Callable[[Job, Path], JobRun],
        finish_job: Callable[[Job, JobRun], Awaitable[None]],
        lane: UnitLane,
        memory_lane: UnitLane,
        on_change: Callable[[], None],
        on_step: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._queue = queue
        self._pool = pool
        self._start_job = start_job
        self._finish_job = finish_job
        self._home = lane
        self._lane = lane
        self._memory_lane = memory_lane
        self._on_change = on_change
        self._on_step = on_step
        self._allowance = 0
        self._ready = False
        self._changed = asyncio.Event()
        self._spent: asyncio.Future[None] | None = None
        self._unit_ms: dict[str, float] = {}
        self._tokens = 0.0
        self._dropped = 0
        self._units_left = 0
        self._run: JobRun | None = None

    # -- what the engine sees --------------------------------------------------------------------------

    def outlook(self) -> Outlook:
        """Whether a unit could run now, and the duration of the slowest kind seen (recent average)."""
        slowest = max(self._unit_ms.values(), default=math.nan)
        return Outlook(self._ready, slowest, micro_batch_units=self._units_left)

    def launch(self, units: int, lane: UnitLane | None = None) -> Awaitable[None]:
        """Allow `units` work units from now on, replacing what was allowed before.

        Returns:
            Something to await that is done when they have run, or training has nothing left to run.
        """
        self._allowance = units
        self._lane = lane or self._home
        if self._spent is not None and not self._spent.done():
            self._spent.set_result(None)
        self._spent = asyncio.get_running_loop().create_future()
        if units <= 0 or not self._ready:
            self._spent.set_result(None)
        self._changed.set()
        return self._spent

    def wake(self) -> None:
        """Look again at whether the job was cancelled, also while nothing is allowed."""
        self._changed.set()

    def state(self) -> TrainerState:
        run = self._run
        return TrainerState(
            tokens=round(self._tokens),
            job=run.job.id if run else None,
            step=run.step if run else None,
            total_steps=run.total_steps if run else None,
            loss=run.loss if run else None,
            dropped_micro_batches=self._dropped,
        )

    # -- the coroutine ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train job after job, until cancelled."""
        while True:
            job = await self._queue.next_job()
            if job is None:
                await self._queue.wait_for_job()
                continue
            try:
                await self._train(job)
            except Cancelled:
                await self._queue.finish_cancelled(job.id)
            except HarliError as error:
                await self._queue.fail(job.id, error.code, error.message)
            except Exception as error:
                log.exception("finetuning job failed", job=job.id)
                await self._queue.fail(job.id, "internal_error", f"{type(error).__name__}: {error}")
            finally:
                self._set_ready(False)
                if self._run is not None:
                    self._run.close()
                self._run = None

    async def _train(self, job: Job) -> None:
        path = await self._queue.file_path(job.training_file)
        run = await self._home.run(self._start_job, job, path)
        self._run = run
        residence = Residence(
            run.state,
            self._pool,
            holder=job.id,
            lane=self._home,
            memory_lane=self._memory_lane,
            on_leave=self._changed.set,
        )
        try:
            while run.step < run.total_steps:
                for index in range(run.micro_batches()):
                    await self._micro_batch(run, residence, index)
                await self._alone(run, residence, WorkUnit("step", run.optimizer_step))
                if run.loss is not None:
                    self._on_step(run.loss)
                await self._queue.progress(job.id, run.step, run.total_steps, run.trained_tokens, run.loss)
                if run.checkpoint_due:
                    await self._alone(run, residence, WorkUnit("step", run.checkpoint))
        finally:
            self._set_ready(False)
            await residence.leave()
            self._on_change()  # the engine settles what came back, also while nothing is served
        await self._finish_job(job, run)

    async def _micro_batch(self, run: JobRun, residence: Residence, index: int) -> None:
        """One micro-batch to its end; dropped and done again as often as serving takes the slots back."""
        while True:
            lease = await self._lease(run, residence, run.slots_of(index))
            before = self._tokens
            try:
                batch = run.begin(index, lease.indices)
                while (unit := batch.next_unit(run.window_tokens, layers=1)) is not None:
                    self._units_left = batch.units_left(run.window_tokens) + run.ends_step(index)
                    if not await self._permitted(run, residence, lease):
                        break
                    await self._execute(residence, unit)
                else:
                    run.finish(batch)
                    return
            finally:
                lease.release()
            self._dropped += 1
            self._tokens = before

    async def _alone(self, run: JobRun, residence: Residence, unit: WorkUnit) -> None:
        """A unit that needs no slots but those of the adapter: the optimizer's step, a checkpoint."""
        while True:
            await self._settled(run, residence)
            self._units_left = 1
            self._set_ready(True)
            if await self._permitted(run, residence, None):
                await self._execute(residence, unit)
                return

    async def _settled(self, run: JobRun, residence: Residence) -> None:
        """Wait until the adapter's state lies in the pool."""
        while not await residence.settle():
            await self._wait_for_slots(run)

    async def _lease(self, run: JobRun, residence: Residence, slots: int) -> Lease:
        """Wait for the slots of a micro-batch, and for the adapter's state beside them."""
        grant = partial(self._pool.grant, slots, self._changed.set, holder=run.job.id)
        while True:
            await self._settled(run, residence)
            lease: Lease | None = await self._memory_lane.run(grant)
            if lease is not None:
                self._set_ready(True)
                return lease
            await self._wait_for_slots(run)

    async def _wait_for_slots(self, run: JobRun) -> None:
        self._raise_if_cancelled(run)
        self._set_ready(False)
        await asyncio.sleep(LEASE_RETRY_S)

    async def _permitted(self, run: JobRun, residence: Residence, lease: Lease | None) -> bool:
        """Wait until a unit may start; False when slots must be given up instead."""
        while True:
            self._raise_if_cancelled(run)
            if not residence.settled or (lease is not None and lease.revoked):
                return False
            if self._allowance > 0:
                return True
            self._changed.clear()
            if self._spent is not None and not self._spent.done():
                self._spent.set_result(None)
            await self._changed.wait()

    async def _execute(self, residence: Residence, unit: WorkUnit) -> None:
        self._allowance -= 1
        started = time.perf_counter()
        async with residence.in_use:
            await self._lane.run(unit.run)
        took = 1e3 * (time.perf_counter() - started)
        before = self._unit_ms.get(unit.kind, took)
        self._unit_ms[unit.kind] = before + 0.1 * (took - before)
        self._tokens += unit.credit

    def _raise_if_cancelled(self, run: JobRun) -> None:
        if self._queue.cancel_requested(run.job.id):
            raise Cancelled

    def _set_ready(self, ready: bool) -> None:
        changed = ready != self._ready
        self._ready = ready
        if not ready and self._spent is not None and not self._spent.done():
            self._spent.set_result(None)
        if changed:
            self._on_change()
