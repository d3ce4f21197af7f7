"""The appliance: every subsystem, put together. Nothing else constructs two of them.

Answers the HTTP API's port. `open` checks everything that can be wrong before anything is started; `start` loads
the model and runs the engine and the trainer; `close` stops them in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import structlog
import torch

from harli_appliance import __version__
from harli_appliance.api.ports import ChatCall, FineTuning, Generation, Job
from harli_appliance.background import Background
from harli_appliance.completions import Completions
from harli_appliance.config import Promise, Settings
from harli_appliance.device.choose import choose_gpu
from harli_appliance.device.cuda import cuda_lanes
from harli_appliance.device.gpu import Gpu
from harli_appliance.device.monitor import Monitor
from harli_appliance.device.monitor_cpu import CpuGauges
from harli_appliance.device.monitor_gpu import GpuGauges
from harli_appliance.device.partition import Partition, cpu_name, cpu_partition
from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.engine.calibration import Calibration, rounds
from harli_appliance.engine.engine import Engine
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import (
    ApplianceUnavailable,
    ConfigError,
    HarliError,
    NotReady,
    UsageError,
)
from harli_appliance.finetuner import Finetuner
from harli_appliance.memory.pool import SlotPool
from harli_appliance.models.architectures import (
    FINETUNABLE,
    architecture,
    finetuning_obstacle,
    longest_context,
    served_context,
)
from harli_appliance.models.catalog import config_of, resolve_model
from harli_appliance.models.size import fitting_slots
from harli_appliance.runtime.architectures import refuse_unservable
from harli_appliance.runtime.protocol import Runtime
from harli_appliance.runtime.text import TextCodec
from harli_appliance.scheduling.names import without_partitions
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker, Target
from harli_appliance.schema import (
    ModelView,
    PolicyChange,
    SloClass,
    Status,
    Timeline,
)
from harli_appliance.status_view import engine_views, hardware_view, job_views, partition_view
from harli_appliance.store.database import Database
from harli_appliance.store.lock import HomeLock
from harli_appliance.store.predictor import load_predictor, save_predictor
from harli_appliance.store.usage import UsageLog
from harli_appliance.training import checkpoints
from harli_appliance.training.fairness import make_order
from harli_appliance.training.queue import JobQueue
from harli_appliance.training.trainer import Trainer
from harli_appliance.training.turns import TokenCounter

if TYPE_CHECKING:
    from harli_appliance.runtime.kv import SglangSlots

log = structlog.get_logger(__name__)

SAVE_PREDICTOR_EVERY_S = 60.0
SHOWN_JOBS = 20


class Appliance:
    """Serving, finetuning and operations of one model on one machine. Build it with `open`."""

    def __init__(
        self,
        settings: Settings,
        lock: HomeLock,
        database: Database,
        usage: UsageLog,
        folder: Path,
        codec: TextCodec,
        partition: Partition,
        context: int | None,
        pool_slots: int,
        gpu: Gpu | None,
    ) -> None:
        self._settings = settings
        self._lock = lock
        self._database = database
        self._usage = usage
        self._folder = folder
        self._codec = codec
        self._partition = partition
        self._context = context
        self._pool_slots = pool_slots
        self._finetuning_obstacle = finetuning_obstacle(config_of(folder))
        self._name = settings.model.served_name or folder.name
        self._state: Literal["starting", "ready", "stopping"] = "starting"
        self._started = time.monotonic()
        self._calibrated: float | None = None
        self._queue = JobQueue(
            database,
            settings,
            model=self._name,
            count_tokens=TokenCounter(codec),
            context_length=longest_context(config_of(folder), context),
            obstacle=self._finetuning_obstacle,
            refuse_unfit=self._refuse_unfit,
        )
        self._gpu = gpu
        self._cuda = cuda_lanes(gpu) if gpu is not None else None
        self._sizes = settings.training.sizes(gpu=gpu is not None)
        self._limits = settings.model.limits(gpu=gpu is not None)
        policy = settings.scheduling.policy
        if self._cuda is not None:
            self._inference = Lane("inference", around=self._cuda.inference.around)
            training = self._cuda.training
            self._training = Lane(
                "training", around=training.around, finish=training.drain, works_on=training.works
            )
        else:
            self._inference = Lane("inference", partition.inference)
            self._training = Lane("training", partition.training)
        self._disk = Lane("disk", partition.training if self._cuda is None else None)
        self._monitor = Monitor(GpuGauges if gpu is not None else partial(CpuGauges, partition))
        slo, on_gpu = settings.slo, gpu is not None
        promise = slo.promise(gpu=on_gpu)
        others: dict[SloClass, Promise] = {
            "interactive": slo.interactive.promise(gpu=on_gpu),
            "batch": slo.batch.promise(gpu=on_gpu),
        }
        self._slo = SloTracker(
            promise.tpot_ms,
            promise.ttft_ms,
            {name: Target(other.tpot_ms, other.ttft_ms) for name, other in others.items()},
        )
        splits = () if self._cuda is None else self._cuda.splits
        self._scheduler = Scheduler(
            Predictor(settings.scheduling.bound_quantile), self._fitting_policy(policy), splits
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._background = Background()
        self._broken = False

    def _fitting_policy(self, wanted: str) -> str:
        """`wanted`, or taking turns where the device cannot run both lanes at once."""
        if self._cuda is None or self._cuda.splits or (found := without_partitions(wanted)) == wanted:
            return wanted
        log.warning("following another policy", policy=found, why="there are no SM partitions")
        return found

    # -- life --------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, settings: Settings) -> Appliance:
        """Take the data directory and check what was asked for; loads no weights.

        Raises:
            HarliError: the directory is taken, the model cannot be had, or a setting does not fit the machine.
        """
        gpu = choose_gpu(settings.device.kind)
        if gpu is not None and not torch.cuda.is_available():
            raise ConfigError(f"the driver shows {gpu.name} and torch does not; run 'harli doctor'")
        lock = HomeLock(settings.home)
        lock.acquire()
        shutil.rmtree(settings.uploads, ignore_errors=True)  # what a process that was killed was being sent
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(lock.release)
            folder = await asyncio.to_thread(resolve_model, settings.model.path, settings)
            config = config_of(folder)
            free, where = (
                (gpu.free_bytes, gpu.name) if gpu else (psutil.virtual_memory().available, "this machine")
            )
            slots = fitting_slots(folder, settings.memory.pool_slots, free, where, gpu=gpu is not None)
            context = served_context(config, settings.model.context_length)
            if architecture(config) not in FINETUNABLE:
                await asyncio.to_thread(refuse_unservable, architecture(config))
            partition = cpu_partition(settings.device.inference_cores, settings.device.training_cores)
            codec = await asyncio.to_thread(TextCodec, folder)
            database = await Database.open(settings.database)
            undo.push_async_callback(database.close)
            usage = await UsageLog.open(settings.home)
            undo.push_async_callback(usage.close)
            appliance = cls(settings, lock, database, usage, folder, codec, partition, context, slots, gpu)
            undo.pop_all()
            return appliance

    async def start(self, on_calibration: Callable[[float], None] = lambda _: None) -> None:
        """Load the model, take up interrupted jobs, and begin to tick.

        Args:
            on_calibration: called with the share of the calibration that is done, where there is one.
        """
        await self._load()
        if self._finetunes:
            await self._finetuner.prepare(self._runtime, self._folder, self._cuda, self._inference)
        self._assemble()
        await self._restore(on_calibration)
        self._keep_running("engine", self._engine.run())
        self._keep_running("predictor", self._save_predictor_forever())
        if self._finetunes and self._settings.training.enabled:
            self._keep_running("trainer", self._trainer.run())
        self._state = "ready"

    async def _load(self) -> None:
        """SGLang with the model, the slots of its cache, and what lies on them."""
        # Imported here: SGLang takes seconds to import, which would hold up the probes on this loop, and one
        # that is not the version we know must be told of before anything of it is used.
        from harli_appliance.runtime import internals

        await asyncio.to_thread(internals.check)
        from harli_appliance.runtime.arguments import RuntimeOptions
        from harli_appliance.runtime.kv import SglangSlots
        from harli_appliance.runtime.sglang_runtime import SglangRuntime

        torch.set_num_threads(1)  # a second OpenMP thread collapses when the other lane is busy
        settings = self._settings
        options = RuntimeOptions(
            model=self._folder,
            device="cpu" if self._gpu is None else "cuda",
            pool_slots=self._pool_slots,
            context_length=self._context,
            max_running_requests=self._limits.max_running_requests,
            chunked_prefill_tokens=self._limits.chunked_prefill_tokens,
            max_lora_rank=settings.training.max_lora_rank,
            max_adapters=settings.training.max_adapters,
            lora=self._finetunes,
            attention=settings.device.attention,
            graphs=settings.device.graphs,
            partitions=self._cuda is not None and bool(self._cuda.splits),
            seed=secrets.randbits(31),  # answers without a seed differ after a restart too
        )
        try:
            self._runtime = await self._inference.run(SglangRuntime, options)
        except HarliError:
            raise
        except Exception as error:
            log.debug("SGLang did not start", exc_info=True)
            why = str(error).partition("\n")[0] or type(error).__name__
            raise ConfigError(f"SGLang cannot load {self._folder}: {why}", param="model") from error
        if self._cuda is not None:
            await self._inference.run(self._runtime.capture_graphs, self._cuda.inference_streams)
        self._slots = await self._inference.run(SglangSlots, self._runtime)
        self._pool = SlotPool(
            self._slots,
            watermark=settings.memory.watermark,
            keep_cached=settings.memory.keep_cached,
            keep_free=settings.memory.keep_free,
        )
        self._shelf = AdapterShelf(self._runtime, self._inference)
        self._finetuner = Finetuner(
            settings,
            self._sizes,
            self._codec,
            self._queue,
            self._pool,
            self._slots,
            self._shelf,
            self._scheduler,
            self._training,
            self._disk,
        )

    def _assemble(self) -> None:
        """Trainer, engine and answers, on what is loaded."""
        settings = self._settings
        self._trainer = Trainer(
            self._queue,
            self._pool,
            start_job=self._finetuner.start_job,
            finish_job=self._finetuner.finish_job,
            order=make_order(settings.training.order),
            max_running=settings.training.max_running_jobs,
            lane=self._training,
            memory_lane=self._inference,
            disk=self._disk,
            on_change=lambda: self._engine.wake(),
            on_step=lambda loss: self._engine.telemetry.loss(loss),
            on_pace=self._scheduler.predictor.observe_training,
        )
        self._queue.watch(self._trainer.heard)
        self._engine = Engine(
            self._runtime,
            self._pool,
            self._scheduler,
            self._trainer,
            self._slo,
            self._inference,
            self._training,
            max_queued=settings.server.max_queued_requests,
            arrange=self._cuda.arrange if self._cuda is not None else lambda _: None,
        )
        self._completions = Completions(
            self._name, self._codec, self._engine, self._shelf, self._usage, self._runtime.context_length
        )

    def _keep_running(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until the appliance closes; that it ends before is a fault, which its state shows."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._broken = True
                log.error("a part of the appliance has ended", part=name, exc_info=error)

        task = asyncio.create_task(work, name=name)
        task.add_done_callback(ended)
        self._tasks.append(task)

    @property
    def _finetunes(self) -> bool:
        return self._finetuning_obstacle is None

    async def _restore(self, on_calibration: Callable[[float], None]) -> None:
        """What earlier processes left: the predictor, interrupted jobs, finished adapters."""
        saved = await self._database.run(lambda db: load_predictor(db, *self._predictor_key))
        wanted = self._settings.scheduling.calibration
        known = wanted != "always" and saved is not None and self._scheduler.predictor.restore(saved)
        if not known and wanted != "never":
            await self._calibrate(on_calibration)
        await self._queue.recover()
        ended = await self._queue.needing_no_checkpoints()
        await asyncio.to_thread(checkpoints.sweep, self._settings.checkpoints, ended)
        for adapter in await self._queue.adapters():
            if adapter.download_only:
                self._shelf.keep_off(adapter.name)
                continue
            try:
                await self._shelf.put(adapter.name, adapter.path, adapter.job_id)
            except HarliError as error:
                log.error("an adapter cannot be served", adapter=adapter.name, why=error.message)

    async def _calibrate(self, on_progress: Callable[[float], None]) -> None:
        def note(share: float) -> None:
            self._calibrated = share
            on_progress(share)

        note(0.0)
        exercise = self._finetuner.exercise() if self._finetunes else None
        calibration = Calibration(
            self._runtime,
            self._scheduler.predictor,
            self._inference,
            self._training,
            exercise,
            unit_tokens=exercise.tokens if exercise is not None else 0.0,
            vocabulary=self._runtime.vocabulary,
            splits=self._cuda.splits if self._cuda is not None else (),
            arrange=self._cuda.arrange if self._cuda is not None else lambda _: None,
            on_progress=note,
        )
        running = self._limits.max_running_requests
        await calibration.run(rounds(self._pool_slots, self._runtime.context_length, running))
        await self._save_predictor()
        self._calibrated = None

    @property
    def _predictor_key(self) -> tuple[str, str, str]:
        return self._device, self._name, __version__

    @property
    def _device(self) -> str:
        if self._gpu is not None:
            without = {
                "graphs": not self._settings.device.graphs,
                "fused kernels": not self._settings.training.fused_kernels,
            }
            return ", no ".join([self._gpu.name, *(name for name, missing in without.items() if missing)])
        inference, training = self._partition.inference, self._partition.training
        return f"{cpu_name()}, {len(inference)}+{len(training)} cores"

    async def _save_predictor_forever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_PREDICTOR_EVERY_S)
            await self._save_predictor()

    async def _save_predictor(self) -> None:
        state = self._scheduler.predictor.state()
        try:
            await self._database.run(lambda db: save_predictor(db, *self._predictor_key, state))
        except ApplianceUnavailable as error:
            log.warning("what was learned of steps is not saved yet", why=error.message)

    async def close(self) -> None:
        """Stop ticking, keep what was learned, let go of the directory. Running jobs resume at the next start."""
        was_ready = self._state == "ready"
        self._state = "stopping"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._background.settled()
        if was_ready:
            await self._completions.close()
            await self._shelf.close()
        await asyncio.to_thread(self._monitor.close)
        await asyncio.to_thread(self._training.close)
        await asyncio.to_thread(self._disk.close)
        if was_ready:
            await self._inference.run(self._runtime.close_graphs)
        await asyncio.to_thread(self._inference.close)
        if self._cuda is not None:
            self._cuda.close()
        if was_ready:
            await self._save_predictor()
        await self._queue.close()
        await self._usage.close()
        await self._database.close()
        self._lock.release()

    # -- for benchmarks, which watch and disturb what is inside -------------------------------------------

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @property
    def trainer(self) -> Trainer:
        """There once it started."""
        return self._trainer

    @property
    def pool(self) -> SlotPool:
        """There once it started."""
        return self._pool

    @property
    def slots(self) -> SglangSlots:
        """There once it started; to be touched on the inference lane only."""
        return self._slots

    @property
    def inference(self) -> Lane:
        return self._inference

    @property
    def runtime(self) -> Runtime:
        """There once it started; to be touched on the inference lane only."""
        return self._runtime

    # -- finetuning --------------------------------------------------------------------------------------

    @property
    def finetuning(self) -> FineTuning:
        return self._queue

    def _refuse_unfit(self, job: Job, files: Sequence[Path]) -> None:
        self._require_ready()
        self._finetuner.refuse_unfit(job, files)

    # -- serving -----------------------------------------------------------------------------------------

    def models(self) -> list[ModelView]:
        base = ModelView(id=self._name, kind="base")
        served = (
            [
                ModelView(id=version.name, kind="adapter", parent=self._name, job=version.job)
                for version in self._shelf.versions
            ]
            if self._state == "ready"
            else []
        )
        return [base, *served]

    async def chat(self, call: ChatCall) -> Generation:
        """Begin an answer; see `Completions.begin`.

        Raises:
            NotReady: it is starting or stopping.
        """
        self._require_ready()
        return await self._completions.begin(call, self._require_ready)

    def _require_ready(self) -> None:
        if self._state != "ready":
            doing = (
                "" if self._calibrated is None else f" (measuring the device, {self._calibrated:.0%} done)"
            )
            raise NotReady(f"the appliance is {self._state}{doing}; try again in a moment")

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter from a folder under `name`, in the place of one that had it.

        It is not kept for the next start.

        Raises:
            UsageError: the name is the base model's, or the adapter does not fit; what was served still is.
        """
        self._require_ready()
        if name == self._name:
            raise UsageError(f"{name!r} is the base model's name; choose another", param="lora_name")
        await self._shelf.put(name, folder)

    async def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter; requests in flight on it finish."""
        self._require_ready()
        await self._shelf.remove(name)

    async def delete_model(self, name: str) -> None:
        """Stop serving what a job has made, and delete it; requests in flight on it finish.

        Raises:
            UsageError: the name is the base model's. NotFound: no job has made a model of this name.
        """
        self._require_ready()
        if name == self._name:
            raise UsageError(f"{name!r} is the base model; only finetuned models are deleted", param="model")
        await self._background.to_the_end(self._delete_model(name))

    async def _delete_model(self, name: str) -> None:
        await self._queue.delete_adapter(name)
        await self._shelf.forget(name)

    # -- operations --------------------------------------------------------------------------------------

    def ready(self) -> bool:
        return self._state == "ready"

    def timeline(self, since: int) -> Timeline:
        self._require_ready()
        return self._engine.telemetry.since(since)

    async def change_policy(self, change: PolicyChange) -> Status:
        self._require_ready()
        if change.policy is not None:  # the first, as it may be refused: then nothing has changed
            self._engine.use_policy(self._fitting_policy(change.policy))
        now = self._slo.target
        tpot, ttft = change.slo_tpot_ms or now.tpot_ms, change.slo_ttft_ms or now.ttft_ms
        self._slo.target = Target(tpot, ttft)
        return await self.status()

    async def status(self) -> Status:
        self._require_ready()
        jobs = await self._queue.overview(SHOWN_JOBS)
        return Status(
            version=__version__,
            state="degraded" if self._engine.degraded or self._broken else self._state,
            uptime_s=time.monotonic() - self._started,
            model=self._name,
            device=self._device,
            partition=partition_view(self._partition, self._cuda),
            jobs=job_views(jobs, self._trainer, self._name),
            models=self.models(),
            hardware=hardware_view(self._monitor.latest),
            **engine_views(self._engine, self._scheduler, self._trainer),
        )
