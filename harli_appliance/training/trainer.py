"""The trainer coroutine: takes jobs from the queue and runs their work units when the engine allows it.

Several jobs run at once, each with an adapter of its own on the one backbone; they take turns of a micro-batch,
in the order that `fairness` chooses. It runs a unit when the engine allows one (`unit_runner`), and gives up its
lease at the next unit boundary when serving takes the slots back. Knows jobs, units and leases; does not know
partitions, policies or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from harli_appliance.api.ports import Job
from harli_appliance.errors import ApplianceUnavailable, HarliError
from harli_appliance.memory.pool import Lease, SlotPool
from harli_appliance.training.active_job import ActiveJob, RunningJob, Spent, Unfinished
from harli_appliance.training.fairness import Order, RecentShares
from harli_appliance.training.job_run import JobRun
from harli_appliance.training.job_source import JobSource
from harli_appliance.training.pace import Pace, Told
from harli_appliance.training.residence import Residence, UnitLane
from harli_appliance.training.spared import Spared
from harli_appliance.training.swap import SwapPredictor
from harli_appliance.training.unit_runner import Ran, UnitRunner
from harli_appliance.training.units import MicroBatch, WorkUnit

log = structlog.get_logger(__name__)

STORE_RETRY_S = 1.0
"""How long to wait before jobs are written down again, after the database could not be."""
PUT_BACK_S, MOST_PUT_BACK_S = 10.0, 640.0
"""How long until a job begins, or ends, again after the disk or the database kept one from it: at first, and after
many times in a row."""
LEASE_RETRY_S = 0.02
"""How long a job waits before it asks again for slots that serving may need now; others may run meanwhile."""


class Stopped(Exception):
    """A person asked to pause or cancel the job whose turn it is; raised at a unit boundary."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What the dashboard shows. `tokens` counts tokens whose backward pass is done. It never falls: what was
    dropped is not counted when it is done again."""

    tokens: int
    running: tuple[RunningJob, ...]
    """In the order in which they began."""
    dropped_micro_batches: int
    swapped_micro_batches: int = 0


class Trainer:
    """Runs up to `max_running` jobs at a time.

    Args:
        start_job: builds the run of a job (adapter, data, held-out data, optimizer).
        finish_job: takes over the finished adapter (serving it, recording it) and ends the job.
        memory_lane: the inference lane, on which the pool may be asked for slots.
        disk: where checkpoints are written: units and states that move do not wait for it.
        on_change: called when training begins or ceases to have work, so that an idle engine looks again.
        on_step: called with the loss of every optimizer step.
        on_pace: called with tokens, the seconds that they took on the lane, and the split that training ran on.

    Attributes:
        units: where the engine says how many units may run.
    """

    def __init__(
        self,
        queue: JobSource,
        pool: SlotPool,
        *,
        start_job: Callable[[Job, Path, Path | None], Awaitable[JobRun]],
        finish_job: Callable[[Job, JobRun], Awaitable[None]],
        order: Order,
        max_running: int,
        lane: UnitLane,
        memory_lane: UnitLane,
        disk: UnitLane,
        on_change: Callable[[], None],
        on_step: Callable[[float], None] = lambda _: None,
        on_pace: Told = lambda tokens, seconds, place: None,
    ) -> None:
        self.units = UnitRunner(lane, on_change)
        self._queue = queue
        self._pool = pool
        self._start_job = start_job
        self._finish_job = finish_job
        self._order = order
        self._max_running = max_running
        self._home = lane
        self._memory_lane = memory_lane
        self._disk = disk
        self._on_change = on_change
        self._on_step = on_step
        self._pace = Pace(on_pace)
        self._tokens = 0.0
        self._shown_tokens = 0
        self._dropped = 0
        self._swapped = 0
        self._swapping = SwapPredictor()
        self._spared = Spared()
        self._active: dict[str, ActiveJob] = {}
        self._current: ActiveJob | None = None
        self._turn_ms = 0.0
        self._begin_at, self._put_back_s = 0.0, PUT_BACK_S
        self._shares = RecentShares()

    # -- what others see ---------------------------------------------------------------------------------

    def heard(self, job: Job) -> None:
        """A person wants something else of `job`: that it stops, perhaps, or has another share of the time."""
        if job.id in self._active:
            self._order.reweigh(job.id, job.priority)
        self.units.wake()

    def state(self) -> TrainerState:
        self._shown_tokens = max(self._shown_tokens, round(self._tokens))
        return TrainerState(
            tokens=self._shown_tokens,
            running=tuple(active.shown(self._shares.of(job)) for job, active in self._active.items()),
            dropped_micro_batches=self._dropped,
            swapped_micro_batches=self._swapped,
        )

    # -- the coroutine ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train jobs, until cancelled. Then the optimizer steps that running jobs have made are kept."""
        try:
            while True:
                try:
                    await self._go_on()
                except ApplianceUnavailable as error:
                    log.error("jobs wait for the database", why=error.message)
                    self.units.set_ready(False)
                    await asyncio.sleep(STORE_RETRY_S)
        finally:
            await self.units.end()
            await self._disk.run(lambda: None)  # what is being written there is over
            for active in list(self._active.values()):
                try:
                    await self._keep(active)
                except Exception:
                    log.exception("the last steps of a job could not be kept", job=active.job.id)
                await self._leave(active.job.id)

    async def _go_on(self) -> None:
        """Whatever is next: to start and stop jobs, one turn, or to wait."""
        await self._start_waiting_jobs()
        await self._stop_asked_jobs()
        if not self._active:
            self.units.set_ready(False)
            if (wait_s := self._begin_at - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            else:
                await self._queue.wait_for_job()
            return
        chosen = self._order.next(self._unblocked())
        if chosen is None:
            self.units.set_ready(False)
            await asyncio.sleep(LEASE_RETRY_S)
            return
        await self._take_turn(self._active[chosen])

    async def _start_waiting_jobs(self) -> None:
        while len(self._active) < self._max_running and time.monotonic() >= self._begin_at:
            job = await self._queue.next_job()
            if job is None:
                return
            self.units.set_ready(False)  # what follows is no unit: the engine must not wait for it
            await self._on_its_own(job, self._start(job))

    async def _start(self, job: Job) -> None:
        path = await self._queue.file_path(job.training_file)
        held_out = await self._queue.file_path(job.validation_file) if job.validation_file else None
        run = await self._start_job(job, path, held_out)
        residence = Residence(
            run.state,
            self._pool,
            holder=job.id,
            lane=self._home,
            memory_lane=self._memory_lane,
            drained=self.units.drain,
            on_leave=self.units.wake,
            on_copy=self._swapping.copied,
        )
        self._active[job.id] = ActiveJob(job, run, residence)
        self._order.join(job.id, job.priority)
        now = await self._queue.begun(job.id, run.step, run.total_steps)
        self._put_back_s = PUT_BACK_S
        self._order.reweigh(job.id, now.priority)  # it may have been changed meanwhile

    async def _stop_asked_jobs(self) -> None:
        """Pause or cancel what someone asked for, but not the job in the middle of its turn."""
        for active in self._others_asked_to_stop():
            ready = self.units.ready
            await self._on_its_own(active.job, self._stop(active.job))
            self.units.set_ready(ready)

    def _others_asked_to_stop(self) -> list[ActiveJob]:
        others = (active for active in self._active.values() if active is not self._current)
        return [active for active in others if self._queue.asked(active.job.id) is not None]

    def _unblocked(self) -> list[str]:
        return [job_id for job_id, active in self._active.items() if not active.blocked]

    async def _on_its_own(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """What goes wrong with one job ends that job and no other."""
        try:
            try:
                await work
            except Stopped:
                await self._stop(job)
        except ApplianceUnavailable as error:
            # The disk or the database is at fault and not the job: it is queued again, and goes on from its last
            # checkpoint.
            await self._leave(job.id)
            self._begin_at = time.monotonic() + self._put_back_s
            self._put_back_s = min(2 * self._put_back_s, MOST_PUT_BACK_S)
            await self._tell(job, error)
            await self._written(partial(self._queue.stopped, job.id))
        except HarliError as error:
            await self._leave(job.id)
            await self._written(partial(self._queue.fail, job.id, error.code, error.message))
        except Exception as error:
            log.exception("finetuning job failed", job=job.id)
            await self._leave(job.id)
            reason = f"{type(error).__name__}: {error}"
            await self._written(partial(self._queue.fail, job.id, "internal_error", reason))

    async def _written(self, write: Callable[[], Awaitable[Job]]) -> None:
        """What has become of a job, as soon as the database takes it."""
        while True:
            try:
                await write()
                return
            except ApplianceUnavailable:
                self.units.set_ready(False)
                await asyncio.sleep(STORE_RETRY_S)

    async def _tell(self, job: Job, error: ApplianceUnavailable) -> None:
        """Why a job waits, where that can be written down."""
        log.error("the disk or the database refuses what a job needs", job=job.id, why=error.message)
        with contextlib.suppress(ApplianceUnavailable):
            await self._queue.event(job.id, "warn", error.message)

    async def _leave(self, job_id: str) -> None:
        """Let go of everything that an ended job holds; one that never began holds nothing.

        Nothing is there to run until another turn begins: what is written down meanwhile may take seconds.
        """
        self.units.set_ready(False)
        active = self._active.pop(job_id, None)
        if active is None:
            return
        self._order.leave(job_id)
        self._shares.forget(job_id)
        try:
            await active.residence.leave()
        except Exception:
            log.exception("the state of an ended job could not be parked", job=job_id)
        active.run.close()
        self._tokens -= active.spent.credited  # a step under way is made again, if at all
        if active.unfinished is not None:
            self._tokens -= active.unfinished.spent.credited
        self._on_change()  # the engine settles what came back, also while nothing is served

    async def _stop(self, job: Job) -> None:
        """Pause or cancel; a pause keeps the optimizer steps made, and the step under way is made again."""
        active = self._active[job.id]
        self.units.set_ready(False)
        if self._queue.asked(job.id) != "cancel":
            active.refused = False  # told again: what the disk refuses now is lost
            await self._keep(active)
        await self._leave(job.id)
        if (await self._queue.stopped(job.id)).status == "cancelled":
            await asyncio.to_thread(active.run.discard_checkpoints)

    async def _keep(self, active: ActiveJob) -> None:
        active.residence.require()
        if active.run.has_unkept_steps:
            await self.units.at_home(active.run.checkpoint, active.residence)
        await self._write(active)

    async def _write(self, active: ActiveJob) -> None:
        """Keep what was taken down; what the disk refuses is tried again with the next, and the job goes on."""
        try:
            await self._disk.run(active.run.write)
            active.refused = False
        except ApplianceUnavailable as error:
            await self._refuse(active, error)

    async def _refuse(self, active: ActiveJob, error: ApplianceUnavailable) -> None:
        if not active.refused:
            active.refused = True
            await self._tell(active.job, error)

    # -- turns -----------------------------------------------------------------------------------------

    async def _take_turn(self, active: ActiveJob) -> None:
        self._current, self._turn_ms = active, 0.0
        try:
            await self._on_its_own(active.job, self._turn(active))
        finally:
            self._current = None
        if active.job.id in self._active:
            self._order.charge(active.job.id, self._turn_ms)

    async def _turn(self, active: ActiveJob) -> None:
        """The next micro-batch; after the last one the optimizer's step or an evaluation's verdict, perhaps a
        checkpoint.

        It ends early when there is no room in the pool now, or serving took it back; the next turn goes on there.
        """
        run = active.run
        if active.index < run.micro_batches():
            if not await self._micro_batch(active):
                return
            active.index += 1
        if not run.done and active.index == run.micro_batches():
            evaluating = run.evaluating
            if not await self._end_round(active):
                return
            active.index, active.spent = 0, Spent()
            self.units.set_ready(False)  # what is written down now may take seconds
            if evaluating:
                await self._write(active)
                await self._queue.evaluated(active.job.id, run.validation.standing)
            else:
                await self._tell_step(active)
            if run.checkpoint_due:
                await self._keep(active)
        if run.done:
            self.units.set_ready(False)
            await active.residence.leave()
            self._on_change()
            try:
                await self._disk.run(run.write)  # the best adapter may be among what was refused
                await self._finish_job(active.job, run)
            except ApplianceUnavailable as error:
                await self._refuse(active, error)
                active.block(PUT_BACK_S)
                return
            await self._leave(active.job.id)

    async def _tell_step(self, active: ActiveJob) -> None:
        run = active.run
        if run.loss is not None:
            self._on_step(run.loss)
        await self._queue.progress(active.job.id, run.step, run.total_steps, run.trained_tokens, run.loss)

    async def _micro_batch(self, active: ActiveJob) -> bool:
        """One micro-batch to its end; False when there are no slots for it now, or serving took some back."""
        run, index = active.run, active.index
        begun = active.unfinished
        lease = await self._lease(
            active,
            begun.batch.slots if begun else run.slots_of(index),
            0 if begun else run.spared_slots_of(index),
        )
        if lease is None:
            return False
        held = lambda: active.residence.settled and not lease.revoked  # noqa: E731
        active.unfinished = None
        done = False
        try:
            if begun is None:
                begin = partial(run.begin, index, lease.indices)
                begun = Unfinished(await self.units.at_home(begin, active.residence))
                self._spared.lend(begun.batch)
            else:
                await self.units.at_home(partial(begun.batch.swap_in, lease.indices), active.residence)
            batch = begun.batch
            while (unit := batch.next_unit(run.window_tokens, layers=1)) is not None:
                left = batch.units_left(run.window_tokens) + run.ends_step(index)
                self.units.offer(left, batch.fusible_tokens)
                if not await self._permitted(active, held):
                    await self._swap_or_drop(active, begun)
                    return False
                unit, worked = self._cut(run, batch) or unit, batch.worked
                ran = await self._execute(active, unit)
                begun.spent += Spent(ran.took_ms, unit.credit)
                if not (ran.fused or run.evaluating):
                    self._pace.ran(batch.worked - worked, ran.took_ms / 1e3, ran.place)
            await self.units.at_home(partial(run.finish, index, batch), active.residence)
            active.spent += begun.spent
            if not run.evaluating:
                self._pace.ended(batch.tokens)
            done = True
        finally:
            await self.units.drain()  # nothing may still write to rows that become another's
            self._spared.end()
            lease.release()
            if begun is not None and not done and active.unfinished is None:
                self._tokens -= begun.spent.credited
        return True

    def _cut(self, run: JobRun, batch: MicroBatch) -> WorkUnit | None:
        """The next unit as it is wanted now; while nothing was permitted, memory and the engine's wish may have
        changed."""
        if self.units.window is not None and batch.fusible_tokens:
            return batch.next_unit(self.units.window, run.layers)
        return batch.next_unit(run.window_tokens, layers=1)

    async def _swap_or_drop(self, active: ActiveJob, begun: Unfinished) -> None:
        """Copy a micro-batch away so that a later turn goes on with it, if that is predicted to cost less than
        doing it again: with the step's others, once its gradients are among theirs."""
        run, batch, size = active.run, begun.batch, begun.batch.swap_bytes
        again = begun.spent + active.spent if batch.has_added else begun.spent
        if not self._swapping.swaps(size, spent_ms=again.took_ms, unit_ms=self.units.unit_ms):
            self._dropped += 1
            index = await self.units.at_home(partial(run.drop, active.index, batch), active.residence)
            if index < active.index:
                self._tokens -= active.spent.credited
                active.index, active.spent = index, Spent()
            return
        took_ms = await self.units.at_home(partial(_timed_ms, batch.swap_out), active.residence)
        self._swapping.copied(size, took_ms)
        self._swapped += 1
        active.unfinished = begun

    async def _end_round(self, active: ActiveJob) -> bool:
        """The optimizer's step or an evaluation's verdict; False when there is no room for the adapter's state, or
        the turn must end."""
        while not self._others_asked_to_stop() and await self._settled(active):
            self.units.offer(1)
            self.units.set_ready(True)
            if await self._permitted(active, lambda: active.residence.settled):
                await self._execute(active, WorkUnit("step", active.run.end_round))
                return True
        return False

    # -- memory ----------------------------------------------------------------------------------------

    async def _settled(self, active: ActiveJob) -> bool:
        """Whether the adapter's state lies in the pool now; when not, the job waits a moment."""
        while not await active.residence.settle():
            if not await self._park_another(active):
                active.block(LEASE_RETRY_S)
                return False
        return True

    async def _lease(self, active: ActiveJob, slots: int, spared: int) -> Lease | None:
        """Slots for a micro-batch beside the adapter's state; when there are none, the job waits a moment.

        Args:
            spared: slots that each layer could use besides, where nobody needs them.
        """

        def grant() -> Lease | None:
            wanted, holder = self.units.wake, active.job.id
            lease = self._pool.grant(slots, wanted, holder=holder)
            if lease is not None and spared:
                leases = self._pool.grant_spare(spared, active.run.layers, wanted, holder=holder)
                self._spared = Spared(leases)
            return lease

        while await self._settled(active):
            lease: Lease | None = await self._memory_lane.run(grant)
            if lease is not None:
                self.units.set_ready(True)
                return lease
            if not await self._park_another(active):
                active.block(LEASE_RETRY_S)
                break
        return None

    async def _park_another(self, active: ActiveJob) -> bool:
        """Move the state of a job that waits for its turn to the host; False when none is in the pool."""
        for other in self._active.values():
            if other is not active and other.residence.settled:
                await self._on_its_own(other.job, other.residence.leave())
                return True
        return False

    # -- units -----------------------------------------------------------------------------------------

    async def _permitted(self, active: ActiveJob, held: Callable[[], bool]) -> bool:
        """Wait until a unit may start; False when what it needs in the pool is no longer `held`, or the turn must
        end."""
        while True:
            if self._queue.asked(active.job.id) is not None:
                raise Stopped
            if (
                self._others_asked_to_stop()
            ):  # takes as long as disk and database do: nobody holds slots meanwhile
                return False
            if self._spared.wanted:
                await self.units.drain()
                self._spared.give_back()
            if not held():
                return False
            if self.units.allowed:
                return True
            await self.units.change()

    async def _execute(self, active: ActiveJob, unit: WorkUnit) -> Ran:
        ran = await self.units.run(unit, active.residence)
        self._turn_ms += ran.took_ms
        self._shares.add(active.job.id, ran.took_ms)
        self._tokens += unit.credit
        return ran


def _timed_ms(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)
