"""What the trainer needs of the model that is served: jobs' runs on its weights, and a place for what they make.

Knows the backbone, the pool's rows and the shelf of adapters; the queue says what to train and the engine when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from harli_appliance.api.ports import Job
from harli_appliance.config import Settings, Sizes
from harli_appliance.device.cuda import CudaLanes
from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import ApplianceUnavailable, ConfigError, HarliError, JobFailed
from harli_appliance.memory.pool import Lease, SlotPool
from harli_appliance.runtime.text import TextCodec
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.dataset import read_examples
from harli_appliance.training.exercise import Exercise
from harli_appliance.training.fused_kernels import fuse
from harli_appliance.training.hyperparameters import adapter_name
from harli_appliance.training.job_run import JobRun, RunOptions
from harli_appliance.training.packing import Encoded, encode
from harli_appliance.training.queue import JobQueue
from harli_appliance.training.rehearsal import Rehearsal
from harli_appliance.training.submission import refuse_unfit

if TYPE_CHECKING:
    from harli_appliance.runtime.kv import SglangSlots
    from harli_appliance.runtime.sglang_runtime import SglangRuntime

log = structlog.get_logger(__name__)

ENCODED_AT_ONCE = 64
"""Examples that are encoded in one piece of work: what serving wants back is let go between two."""


class Finetuner:
    """Only `prepare` makes it of use.

    Args:
        sizes: of micro-batches and units.
        slots: the pool's rows.
        shelf: where finished adapters are served from.
        lane: that training runs on.
        disk: where adapters are written.
    """

    def __init__(
        self,
        settings: Settings,
        sizes: Sizes,
        codec: TextCodec,
        queue: JobQueue,
        pool: SlotPool,
        slots: SglangSlots,
        shelf: AdapterShelf,
        scheduler: Scheduler,
        lane: Lane,
        disk: Lane,
    ) -> None:
        self._settings = settings
        self._sizes = sizes
        self._codec = codec
        self._queue = queue
        self._pool = pool
        self._buffers = (slots.k_buffers, slots.v_buffers)
        self._shelf = shelf
        self._scheduler = scheduler
        self._lane = lane
        self._disk = disk

    async def prepare(
        self, runtime: SglangRuntime, folder: Path, cuda: CudaLanes | None, inference: Lane
    ) -> None:
        """Put modules around the served weights, and have memory set aside for units."""
        from harli_appliance.runtime.weights import shared_model  # imports SGLang, which takes seconds

        model = await self._lane.run(shared_model, runtime.model, folder)
        fused = cuda is not None and self._settings.training.fused_kernels
        self._backbone = Backbone(model, await self._lane.run(fuse, model) if fused else None)
        if cuda is not None:
            # torch prefers cuDNN's attention on Hopper, which is compiled anew for every length there is.
            torch.backends.cuda.enable_cudnn_sdp(False)
            if self._settings.training.enabled:
                await self._rehearse(cuda, inference)

    def refuse_unfit(self, job: Job, files: Sequence[Path]) -> None:
        """Raise if a job with these files could never run here."""
        refuse_unfit(job, files, self._backbone, self._codec, self._buffers, self._pool.leasable)

    async def start_job(self, job: Job, data: Path, held_out: Path | None) -> JobRun:
        """A job's run; its files are read and encoded first.

        Raises:
            ApplianceUnavailable: a file cannot be read now.
        """
        examples = await self._encoded(data)
        kept_back = await self._encoded(held_out) if held_out is not None else []
        return await self._lane.run(
            JobRun,
            job,
            examples,
            self._backbone.twin(),
            self._buffers,
            self._options,
            self._pool.leasable,
            kept_back,
        )

    @property
    def _options(self) -> RunOptions:
        training = self._settings.training
        return RunOptions(
            window_tokens=self._sizes.window_tokens,
            sequence_tokens=self._sizes.sequence_tokens,
            checkpoint_every_steps=training.checkpoint_every_steps,
            keep_checkpoints=training.keep_checkpoints,
            checkpoints=self._settings.checkpoints,
            fuses=lambda: self._scheduler.fuses,
        )

    async def _encoded(self, data: Path) -> list[Encoded]:
        """The examples of a file, encoded on the training lane, a few at a time."""
        examples, found = read_examples(data), list[Encoded]()

        def some() -> list[Encoded]:
            return [encode(example, self._codec) for example in islice(examples, ENCODED_AT_ONCE)]

        try:
            while piece := await self._lane.run(some):
                found += piece
        except OSError as error:  # the disk's fault, or too many open files; not the job's
            raise ApplianceUnavailable(
                f"{data} cannot be read: {error.strerror}; check its disk", code="storage_unavailable"
            ) from error
        return found

    async def finish_job(self, job: Job, run: JobRun) -> None:
        """Keep the adapter, serve it where it can be, and only then say that the job has succeeded."""
        folder = self._settings.adapters / job.id
        await self._disk.run(run.save_adapter, folder)
        if job.download_only:
            self._shelf.keep_off(adapter_name(job))
        else:
            try:
                await self._shelf.put(adapter_name(job), folder, job.id)
            except HarliError as error:  # what was learned is kept all the same
                log.error("an adapter cannot be served", adapter=adapter_name(job), why=error.message)
                message = f"The adapter can be downloaded, but not served: {error.message}"
                await self._queue.event(job.id, "warn", message)
        try:
            await self._queue.succeed(job.id, folder, job.lora_rank)
        except ApplianceUnavailable:
            # Until that is tried again, or a person cancels the job.
            await self._shelf.forget(adapter_name(job))
            raise
        await asyncio.to_thread(run.discard_checkpoints)

    def exercise(self) -> Exercise:
        """What a calibration runs beside steps."""
        return Exercise(self._backbone, self._sizes.window_tokens)

    async def _rehearse(self, cuda: CudaLanes, inference: Lane) -> None:
        """Make an optimizer step on every stream that training may run on.

        Raises:
            ConfigError: the device's memory is too small for it beside the cache.
        """
        before = torch.cuda.memory_reserved()
        try:
            rehearsal = await self._lane.run(
                partial(
                    Rehearsal,
                    self._backbone.twin(),
                    self._buffers,
                    rank=self._settings.training.max_lora_rank,
                    options=self._options,
                    leasable=self._pool.leasable,
                    times=len(cuda.splits) + 2,
                )
            )
        except JobFailed as error:  # jobs of this size will be refused for the same reason
            log.warning("no memory is set aside for training", why=error.message)
            return
        held = list[Lease]()
        try:
            for grant, slots in (
                (self._pool.grant_contiguous, rehearsal.state_slots),
                (self._pool.grant, rehearsal.slots),
            ):
                lease = await inference.run(grant, slots, lambda: None)
                assert lease is not None  # noqa: S101 - nothing is served yet, and it fits
                held.append(lease)
            state, rows = held
            await self._lane.run(rehearsal.place, state.indices)
            for _ in cuda.training_places():
                await self._lane.run(rehearsal.make, rows.indices)
                await self._lane.drain()
            await inference.run(rehearsal.make, rows.indices)  # where units run when the lanes take turns
        except JobFailed as error:
            log.warning("not all memory is set aside for training", why=error.message)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the GPU's memory is too small for training beside {self._pool.size} cache slots: set "
                "memory.pool_slots lower, or training.enabled = false",
                param="memory.pool_slots",
            ) from error
        finally:
            await self._lane.run(rehearsal.close)
            for lease in held:
                lease.release()
        mib = (torch.cuda.memory_reserved() - before) >> 20
        log.info("memory is set aside for training", mib=mib)
