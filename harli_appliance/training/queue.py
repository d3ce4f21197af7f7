"""The job queue: what people ask of it, and what the trainer tells it. Its files are `file_library`'s.

Every method has its effect on disk when it returns. It lives on one event loop, on which the trainer waits
for jobs; a caller that goes away in the middle (a client that hangs up) leaves nothing half done. Knows
no tokenizer, no HTTP and no partition.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sqlite_utils import Database as Connection

from harli_appliance.api.ports import FineTuning, Job, JobEvent, JobSpec, StoredFile
from harli_appliance.config import Settings
from harli_appliance.errors import Conflict, NotFound, UsageError
from harli_appliance.schema import ENDED, JobStatus
from harli_appliance.store import adapters as adapter_rows
from harli_appliance.store import files as file_rows
from harli_appliance.store import jobs as job_rows
from harli_appliance.store.adapters import Adapter
from harli_appliance.store.database import Database
from harli_appliance.training import checkpoints
from harli_appliance.training.dataset import CountTokens
from harli_appliance.training.file_library import FileLibrary, one_line
from harli_appliance.training.hyperparameters import adapter_name, check_priority, resolve
from harli_appliance.training.validation import Standing

STEP_EVENTS = 100
"""A job tells of about so many of its steps, however long it is; the row always has the last one."""

_OUTCOMES: Mapping[job_rows.Ask, JobStatus] = {"pause": "paused", "cancel": "cancelled"}


class JobQueue(FileLibrary, FineTuning):
    """Files, jobs and adapters of one data directory.

    Args:
        model: name of the served base model, the only one that can be finetuned. Jobs and adapters of
            another name wait until that is served.
        count_tokens: tells how long an example is; without it no length is checked.
        context_length: tokens that an example may have at most.
        obstacle: why that model cannot be finetuned at all, if it cannot.
        refuse_unfit: called in a thread of its own; raises when a job with these files could never run here.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        model: str,
        count_tokens: CountTokens | None = None,
        context_length: int | None = None,
        obstacle: str | None = None,
        refuse_unfit: Callable[[Job, Sequence[Path]], None] = lambda job, files: None,
    ) -> None:
        super().__init__(database, settings, count_tokens=count_tokens, context_length=context_length)
        self._model = model
        self._obstacle = obstacle
        self._refuse_unfit = refuse_unfit
        self._tell: Callable[[Job], None] = lambda job: None
        self._queued = asyncio.Event()
        self._asked: dict[str, job_rows.Ask] = {}

    def watch(self, tell: Callable[[Job], None]) -> None:
        """Call `tell` from now on with every job of which a person wants something else than before."""
        self._tell = tell

    # -- jobs ----------------------------------------------------------------------------------------------

    async def create_job(self, spec: JobSpec) -> Job:
        """Queue a job.

        Raises:
            UsageError: a value is out of its range (names the field), or the job or any could never run here.
            NotFound: there is no such training file.
            Conflict: finetuning is switched off.
        """
        if self._obstacle is not None:
            raise UsageError(self._obstacle, param="model")
        if not self._settings.training.enabled:
            raise Conflict(
                "finetuning is switched off here; set training.enabled to true", code="training_disabled"
            )
        job = resolve(spec, model=self._model, max_lora_rank=self._settings.training.max_lora_rank)
        return await self._background.to_the_end(self._create_job(job))

    async def _create_job(self, job: Job) -> Job:
        await self._database.run(lambda db: _check_files(db, job))
        names = [name for name in (job.training_file, job.validation_file) if name is not None]
        await asyncio.to_thread(self._refuse_unfit, job, [await self.file_path(name) for name in names])

        def insert(db: Connection) -> Job:
            _check_files(db, job)  # again: a file may have been deleted meanwhile
            created = job_rows.insert_job(db, job)
            job_rows.add_event(db, job.id, "info", f"Created fine-tuning job: {job.id}")
            return created

        created = await self._database.run(insert)
        self._queued.set()
        return created

    async def jobs(self, limit: int = 20, after: str | None = None) -> tuple[list[Job], bool]:
        return await self._database.run(lambda db: job_rows.list_jobs(db, limit, after))

    async def job(self, job_id: str) -> Job:
        return await self._database.run(lambda db: job_rows.get_job(db, job_id))

    async def events(
        self, job_id: str, limit: int = 20, after: str | None = None
    ) -> tuple[list[JobEvent], bool]:
        return await self._database.run(lambda db: job_rows.list_events(db, job_id, limit, after))

    async def cancel_job(self, job_id: str) -> Job:
        """Cancel a job at once, or ask the trainer to cancel a running one (it still shows running).

        Raises:
            Conflict: the job has ended.
        """

        def cancel(db: Connection) -> Job:
            job = job_rows.get_job(db, job_id)
            if job.status in ENDED:
                raise _state(job, "only a job that has not ended can be cancelled")
            if job.status != "running":
                return _move(db, job_id, "cancelled")
            if job_rows.asked_of(db, job_id) != "cancel":
                job_rows.update_running(db, job_id, asked="cancel")
                job_rows.add_event(db, job_id, "info", "Cancellation requested")
            return job

        return await self._background.to_the_end(self._cancel_job(job_id, cancel))

    async def _cancel_job(self, job_id: str, cancel: Callable[[Connection], Job]) -> Job:
        job = await self._ask(job_id, cancel)
        if job.status == "cancelled":
            await asyncio.to_thread(checkpoints.discard, self._settings.checkpoints / job_id)
        return job

    async def pause_job(self, job_id: str) -> Job:
        """Pause a queued job at once, or ask the trainer to pause a running one (it still shows running).

        A paused job keeps what it has learned, also over a restart, until it is resumed or cancelled.

        Raises:
            Conflict: the job has ended, or is being cancelled.
        """

        def pause(db: Connection) -> Job:
            job = job_rows.get_job(db, job_id)
            if job.status in ENDED:
                raise _state(job, "only a job that has not ended can be paused")
            if job.status == "queued":
                return _move(db, job_id, "paused")
            asked = job_rows.asked_of(db, job_id)
            if asked == "cancel":
                raise Conflict(f"job '{job_id}' is being cancelled; it cannot be paused", code="job_state")
            if job.status == "running" and asked is None:
                job_rows.update_running(db, job_id, asked="pause")
                job_rows.add_event(db, job_id, "info", "Pause requested")
            return job

        return await self._background.to_the_end(self._ask(job_id, pause))

    async def resume_job(self, job_id: str) -> Job:
        """Queue a paused job again, or let a running one go on that was asked to pause.

        Raises:
            Conflict: the job is neither.
        """

        def resume(db: Connection) -> Job:
            job = job_rows.get_job(db, job_id)
            if job.status == "running" and job_rows.asked_of(db, job_id) == "pause":
                job_rows.add_event(db, job_id, "info", "Pause withdrawn")
                return job_rows.update_running(db, job_id, asked=None)
            if job.status != "paused":
                raise _state(job, "only a paused job can be resumed")
            return _move(db, job_id, "queued")

        job = await self._background.to_the_end(self._ask(job_id, resume))
        self._queued.set()
        return job

    async def set_priority(self, job_id: str, priority: int) -> Job:
        """Change when a waiting job begins, and how much device time a running one gets beside others.

        Raises:
            UsageError: there is no such priority.
            Conflict: the job has ended.
        """
        check_priority(priority)

        def change(db: Connection) -> Job:
            job = job_rows.set_priority(db, job_id, priority)
            job_rows.add_event(db, job_id, "info", f"Priority set to {priority}")
            return job

        return await self._background.to_the_end(self._ask(job_id, change))

    async def overview(self, limit: int) -> list[Job]:
        """The jobs that matter now: those that have not ended first."""
        return await self._database.run(lambda db: job_rows.overview(db, limit))

    async def _ask(self, job_id: str, work: Callable[[Connection], Job]) -> Job:
        """Do `work`, and let those who watch know what is asked of the job from now on."""

        def transaction(db: Connection) -> tuple[Job, job_rows.Ask | None]:
            return work(db), job_rows.asked_of(db, job_id)

        job, asked = await self._database.run(transaction)
        if asked is None:
            self._asked.pop(job_id, None)
        else:
            self._asked[job_id] = asked
        self._tell(job)
        return job

    # -- for the trainer -----------------------------------------------------------------------------------

    async def recover(self) -> None:
        """At start: queue again what ran when the last process ended, and sweep what it left half done.

        Jobs of a model that is not served now are told that they wait for it.
        """

        def requeue(db: Connection) -> list[str]:
            for job in job_rows.jobs_in(db, "running"):
                if job_rows.asked_of(db, job.id) is not None:
                    _stopped(db, job.id)
                    continue
                job_rows.move_job(db, job.id, "queued")
                message = "The appliance was started again; the job resumes from its last checkpoint"
                job_rows.add_event(db, job.id, "warn", message)
            for job in [*job_rows.jobs_in(db, "queued"), *job_rows.jobs_in(db, "paused")]:
                if job.model != self._model:
                    _tell_once(db, job.id, f"Waits for its model: {job.model}; {self._model} is served now")
            return [file.id for file in file_rows.list_files(db)]

        known = await self._database.run(requeue)
        await self._sweep(known)
        self._queued.set()

    async def wait_for_job(self) -> None:
        """Return when a job is queued."""
        while True:
            await self._queued.wait()
            self._queued.clear()
            try:
                found = await self._database.run(self._next_queued) is not None
            except BaseException:
                self._queued.set()
                raise
            if found:
                self._queued.set()
                return

    async def next_job(self) -> Job | None:
        """The job that is next (the highest priority, then the oldest), now running; None when none waits.

        Cheap when none was queued since the last time that there was none.
        """
        if not self._queued.is_set():
            return None
        self._queued.clear()
        try:
            job = await self._database.run(self._start_next)
        except BaseException:
            self._queued.set()  # nobody knows whether there is one
            raise
        if job is not None:
            self._queued.set()  # there may be another
        return job

    def _next_queued(self, db: Connection) -> Job | None:
        return job_rows.next_queued(db, self._model)

    def _start_next(self, db: Connection) -> Job | None:
        job = self._next_queued(db)
        if job is None:
            return None
        job_rows.add_event(db, job.id, "info", "Job started" if job.started_at is None else "Job resumed")
        return job_rows.move_job(db, job.id, "running")

    def asked(self, job_id: str) -> job_rows.Ask | None:
        """What someone asked of this running job; cheap enough to look up before each work unit."""
        return self._asked.get(job_id)

    async def begun(self, job_id: str, step: int, total_steps: int) -> Job:
        """Keep how many steps a job that begins or resumes has made and will make."""
        return await self._database.run(
            lambda db: job_rows.update_running(db, job_id, step=step, total_steps=total_steps)
        )

    async def progress(
        self, job_id: str, step: int, total_steps: int, trained_tokens: int, loss: float | None
    ) -> None:
        """Keep how far a running job is. `step` may be lower than before: a resumed job repeats steps."""
        finite = loss if loss is not None and math.isfinite(loss) else None

        def keep(db: Connection) -> None:
            job_rows.update_running(
                db, job_id, step=step, total_steps=total_steps, trained_tokens=trained_tokens, loss=finite
            )
            if step % math.ceil(total_steps / STEP_EVENTS) and step not in (1, total_steps):
                return
            data: dict[str, float | int | str] = {"step": step, "total_steps": total_steps}
            if finite is None:
                job_rows.add_event(db, job_id, "warn", f"Step {step}/{total_steps}: no finite loss", data)
            else:
                message = f"Step {step}/{total_steps}: training loss={finite:.4g}"
                job_rows.add_event(db, job_id, "info", message, {**data, "train_loss": finite})

        await self._database.run(keep)

    async def evaluated(self, job_id: str, standing: Standing) -> None:
        """Keep what the last evaluation of a running job has shown."""
        loss = standing.loss if standing.loss is not None and math.isfinite(standing.loss) else None

        def keep(db: Connection) -> None:
            job = job_rows.update_running(db, job_id, valid_loss=loss, best_step=standing.best_step)
            data: dict[str, float | int | str] = {"step": standing.step, "best_step": standing.best_step}
            where = f"Step {standing.step}/{job.total_steps}"
            if loss is None:
                job_rows.add_event(db, job_id, "warn", f"{where}: no finite validation loss", data)
                return
            data["valid_loss"] = loss
            verdict = "the best" if standing.stale == 0 else f"the best was step {standing.best_step}"
            job_rows.add_event(db, job_id, "info", f"{where}: validation loss={loss:.4g}, {verdict}", data)
            if 0 < job.early_stopping_patience <= standing.stale:
                message = (
                    f"No better in {standing.stale} evaluations: the job ends with step {standing.best_step}"
                )
                job_rows.add_event(db, job_id, "info", message)

        await self._database.run(keep)

    async def event(
        self, job_id: str, level: job_rows.Level, message: str, data: job_rows.EventData | None = None
    ) -> JobEvent:
        """Tell of something in a job's life. Numbers in `data` are finite."""
        return await self._database.run(
            lambda db: job_rows.add_event(db, job_id, level, one_line(message), data)
        )

    async def succeed(self, job_id: str, adapter_path: Path, rank: int) -> Job:
        """End a running job with its adapter, which lies complete at `adapter_path`."""

        def end(db: Connection) -> Job:
            name = adapter_name(job_rows.get_job(db, job_id))
            job = job_rows.move_job(db, job_id, "succeeded", fine_tuned_model=name)
            place, alone = self._relative(adapter_path), job.download_only
            adapter_rows.insert_adapter(db, name, job_id, place, rank, download_only=alone)
            job_rows.add_event(db, job_id, "info", f"New fine-tuned model created: {name}")
            if alone:
                message = (
                    f"A {job.peft_method} adapter cannot be served; fetch it: harli jobs download {job_id}"
                )
                job_rows.add_event(db, job_id, "warn", message)
            job_rows.add_event(db, job_id, "info", "The job has successfully completed")
            return job

        return self._ended(await self._database.run(end))

    async def fail(self, job_id: str, code: str, message: str) -> Job:
        """End a running job without an adapter."""

        def end(db: Connection) -> Job:
            reason = one_line(message)
            job = job_rows.move_job(db, job_id, "failed", error_code=code, error_message=reason)
            job_rows.add_event(db, job_id, "error", f"Job failed: {reason}", {"code": code})
            return job

        return self._ended(await self._database.run(end))

    async def stopped(self, job_id: str) -> Job:
        """Nothing of a running job runs any more, because of what was asked: it is cancelled or paused now.

        When that was withdrawn at the last moment the job is queued again.
        """
        job = self._ended(await self._database.run(lambda db: _stopped(db, job_id)))
        self._queued.set()
        return job

    async def needing_no_checkpoints(self) -> set[str]:
        """Ids of the jobs whose checkpoints are of no use any more."""
        return await self._database.run(job_rows.needing_no_checkpoints)

    async def adapters(self) -> list[Adapter]:
        """Every finished adapter of the served model, the oldest first."""
        found = await self._database.run(lambda db: adapter_rows.list_adapters(db, self._model))
        return [replace(adapter, path=self._settings.home / adapter.path) for adapter in found]

    async def delete_adapter(self, name: str) -> None:
        """Delete a finished adapter; its job stays.

        Raises:
            NotFound: there is none of this name.
        """

        def delete(db: Connection) -> Adapter:
            found = adapter_rows.delete_adapter(db, name)
            if found is None:
                raise NotFound(
                    f"no job has made a model '{name}'; 'harli models' lists those that are served",
                    code="model_not_found",
                    param="model",
                )
            job_rows.add_event(db, found.job_id, "info", f"{name} was deleted")
            return found

        found = await self._database.run(delete)
        await asyncio.to_thread(shutil.rmtree, self._settings.home / found.path, ignore_errors=True)

    async def adapter_folder(self, job_id: str) -> Path:
        """Where the adapter of a job lies.

        Raises:
            NotFound: there is no such job, or its adapter is gone.
            Conflict: the job has made none.
        """

        def find(db: Connection) -> Path:
            job = job_rows.get_job(db, job_id)
            adapter = adapter_rows.adapter_of(db, job_id)
            if adapter is None and job.status == "succeeded":
                raise NotFound(f"the model that job '{job_id}' made was deleted; run the job again")
            if adapter is None:
                raise Conflict(
                    f"job '{job_id}' is {job.status} and has no adapter; wait until it has succeeded",
                    code="job_state",
                )
            return self._settings.home / adapter.path

        folder = await self._database.run(find)
        if not await asyncio.to_thread(folder.is_dir):
            raise NotFound(f"the adapter of job '{job_id}' is gone from {folder}; run the job again")
        return folder

    # -- inside --------------------------------------------------------------------------------------------

    def _ended(self, job: Job) -> Job:
        self._asked.pop(job.id, None)
        return job

    def _relative(self, path: Path) -> Path:
        """A path in the data directory is kept relative to it, so that the directory can be moved."""
        home = self._settings.home
        return path.relative_to(home) if path.is_relative_to(home) else path.absolute()


def _stopped(db: Connection, job_id: str) -> Job:
    asked = job_rows.asked_of(db, job_id)
    return _move(db, job_id, "queued" if asked is None else _OUTCOMES[asked])


def _move(db: Connection, job_id: str, status: JobStatus) -> Job:
    job = job_rows.move_job(db, job_id, status)
    job_rows.add_event(db, job_id, "info", "Job queued again" if status == "queued" else f"Job {status}")
    return job


def _tell_once(db: Connection, job_id: str, message: str) -> None:
    """Warn, unless that was the last that was told of the job."""
    last, _ = job_rows.list_events(db, job_id, 1, None)
    if not last or last[0].message != message:
        job_rows.add_event(db, job_id, "warn", message)


def _state(job: Job, rule: str) -> Conflict:
    return Conflict(f"job '{job.id}' is {job.status}; {rule}", code="job_state")


def _check_files(db: Connection, job: Job) -> None:
    """Raises: NotFound, UsageError: a file of the job is not there, or not of the format that its method reads."""
    for param in ("training_file", "validation_file"):
        if (file_id := getattr(job, param)) is not None:
            _check_format(job, file_rows.get_file(db, file_id, param=param), param)


def _check_format(job: Job, file: StoredFile, param: str) -> None:
    """Raises: UsageError: the file is not of the format that the job's method learns from."""
    if (job.method == "dpo") != (file.format == "preference"):
        wanted = "preferences" if job.method == "dpo" else "chats or texts"
        raise UsageError(
            f"file '{file.id}' is of the format {file.format}, but the method {job.method} learns from {wanted}; "
            "choose another file or method",
            param=param,
        )
