"""A fake appliance: answers `AppliancePort` from memory, to test API, CLI and dashboard without torch."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from harli_appliance.api.app import create_app
from harli_appliance.api.ports import ChatCall, Job, JobEvent, JobSpec, StoredFile, TextDelta
from harli_appliance.api.server import Listener, serve
from harli_appliance.config import Settings
from harli_appliance.errors import Conflict, DatasetError, NotFound, NotReady
from harli_appliance.schema import (
    ENDED,
    TARGET_MODULES,
    HardwareView,
    JobView,
    ModelView,
    PartitionView,
    Percentiles,
    PolicyChange,
    PoolView,
    PredictorView,
    RunningJobView,
    Sample,
    ServingView,
    SloClassView,
    SloView,
    Status,
    Timeline,
    TrainingView,
)

BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Finding:
    line: int
    code: str
    message: str


class FakeGeneration:
    """Plays deltas; stays at delta `hold_at`, which sets `holding`, until aborted; raises `failure` after the last
    one."""

    def __init__(
        self,
        deltas: Sequence[TextDelta],
        failure: Exception | None = None,
        hold_at: int | None = None,
        holding: asyncio.Event | None = None,
    ) -> None:
        self.deltas = deltas
        self.failure = failure
        self.hold_at = hold_at
        self.holding = holding or asyncio.Event()
        self.ended = False
        self.aborts = 0
        self.aborted_midway = asyncio.Event()
        self.prompt_tokens = 7
        self.cached_tokens = 3

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        for index, delta in enumerate(self.deltas):
            if index == self.hold_at:
                self.holding.set()
                await self.aborted_midway.wait()
                return
            yield delta
        if self.failure is not None:
            raise self.failure
        self.ended = True

    def abort(self) -> None:
        self.aborts += 1
        if not self.ended:
            self.aborted_midway.set()


def words(*texts: str, finish: str | None = "stop") -> list[TextDelta]:
    """One delta a text, the last one carrying the finish reason."""
    deltas = [TextDelta(text=text, tokens=1) for text in texts]
    if finish is not None:
        deltas[-1] = replace(deltas[-1], finish_reason=finish)  # type: ignore[arg-type]
    return deltas


def make_status(**changes: object) -> Status:
    status = Status(
        version="0.1.0",
        state="ready",
        uptime_s=3723.0,
        model=BASE,
        device="CPU, 2 cores",
        policy="adaptive",
        mode="partition",
        reason="corun_keeps_pace",
        ticks={"corun_keeps_pace": 300, "keeps_reserve": 20},
        slo=SloView(
            tpot_ms=250.0,
            ttft_ms=10_000.0,
            attainment=0.995,
            classes=[
                SloClassView(
                    name="standard", tpot_ms=250.0, ttft_ms=10_000.0, requests=400, attainment=0.998
                ),
                SloClassView(name="interactive", tpot_ms=150.0, ttft_ms=3_000.0, requests=0),
                SloClassView(name="batch", tpot_ms=1_000.0, ttft_ms=60_000.0, requests=20, attainment=0.75),
            ],
        ),
        serving=ServingView(
            running=6,
            waiting=1,
            requests=420,
            failed=2,
            tpot_ms=Percentiles(p50=181.0, p99=233.0, last=190.0),
            itl_ms=Percentiles(p50=178.0, p99=260.0, last=184.0),
            ttft_ms=Percentiles(p50=400.0, p99=1900.0, last=380.0),
            output_tokens=51_234,
            output_tokens_per_s=33.4,
        ),
        training=TrainingView(
            tokens=98_765,
            tokens_per_s=52.5,
            running=[RunningJobView(job="ftjob-run", step=31, total_steps=100, loss=1.734, device_share=1.0)],
        ),
        partition=PartitionView(inference="core 0", training="core 1", inference_share=0.5),
        pool=make_pool(),
        predictor=PredictorView(samples=900, median_error=0.04, above_bound=0.008),
        jobs=[
            JobView(
                id="ftjob-run",
                status="running",
                model=BASE,
                step=31,
                total_steps=100,
                loss=1.734,
                device_share=1.0,
                created_at=1_790_000_000,
            ),
            JobView(id="ftjob-wait", status="queued", model=BASE, total_steps=40, created_at=1_790_000_100),
            JobView(
                id="ftjob-done",
                status="succeeded",
                model=BASE,
                fine_tuned_model="ft:smollm2:harbour",
                step=40,
                total_steps=40,
                loss=0.412,
                created_at=1_789_990_000,
            ),
        ],
        models=[
            ModelView(id=BASE, kind="base"),
            ModelView(id="ft:smollm2:harbour", kind="adapter", parent=BASE, job="ftjob-done"),
        ],
        hardware=HardwareView(
            compute=0.94, inference=0.97, training=0.91, memory_bytes=3 << 30, memory_total_bytes=24 << 30
        ),
    )
    return status.model_copy(update=changes)


def make_pool(serving: int = 4096, cached: int = 2048, leased: int = 6144, slots: int = 16_384) -> PoolView:
    return PoolView(
        slots=slots,
        free=slots - serving - cached - leased,
        serving=serving,
        cached=cached,
        leased=leased,
        leased_max=7000,
        reclaims=3,
    )


def make_sample(seq: int, tpot_ms: float | None = 180.0, **changes: object) -> Sample:
    sample = Sample(
        seq=seq,
        t=1_790_000_000.0 + seq * 0.25,
        mode="partition",
        running=6,
        step_ms=tpot_ms,
        tpot_ms=tpot_ms,
        output_tokens=8,
        training_tokens=13,
        loss=None,
        pool=make_pool(),
    )
    return sample.model_copy(update=changes)


class FakeAppliance:
    """Answers every chat with `deltas`; keeps files and jobs in dicts; lets a test set what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deltas = words("Hello", " ", "world", "!")
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.hold_at: int | None = None
        self.holding = asyncio.Event()
        self.queue: asyncio.Event | None = None
        self.left_queue = asyncio.Event()
        self.in_queue = asyncio.Event()
        self.is_ready = True
        self.calls: list[ChatCall] = []
        self.generations: list[FakeGeneration] = []
        self.specs: list[JobSpec] = []
        self.stored: dict[str, StoredFile] = {}
        self.all_jobs: dict[str, Job] = {}
        self.all_events: dict[str, list[JobEvent]] = {}
        self.status_now = make_status()
        self.samples = [make_sample(seq) for seq in range(8)]
        self.changes: list[PolicyChange] = []

    # -- serving ---------------------------------------------------------------------------------

    def models(self) -> list[ModelView]:
        return self.status_now.models

    async def chat(self, call: ChatCall) -> FakeGeneration:
        self.calls.append(call)
        if self.refusal is not None:
            raise self.refusal
        if self.queue is not None:
            self.in_queue.set()
            try:
                await self.queue.wait()
            except asyncio.CancelledError:
                self.left_queue.set()
                raise
        generation = FakeGeneration(self.deltas, self.failure, self.hold_at, self.holding)
        self.generations.append(generation)
        return generation

    # -- files and jobs --------------------------------------------------------------------------

    @property
    def finetuning(self) -> FakeAppliance:
        return self

    async def create_file(self, path: Path, filename: str, purpose: str) -> StoredFile:
        if b"broken" in path.read_bytes():
            raise DatasetError(
                "1 line is malformed", findings=[Finding(3, "invalid_json", "line 3: no JSON")]
            )
        file_id = f"file-{len(self.stored)}"
        size = path.stat().st_size
        shutil.move(path, self.folder / file_id)
        self.stored[file_id] = StoredFile(file_id, filename, purpose, size, 1_790_000_000)
        return self.stored[file_id]

    async def files(self) -> list[StoredFile]:
        return list(self.stored.values())[::-1]

    async def file(self, file_id: str) -> StoredFile:
        if file_id not in self.stored:
            raise NotFound(f"no file '{file_id}'")
        return self.stored[file_id]

    async def file_path(self, file_id: str) -> Path:
        return self.folder / (await self.file(file_id)).id

    async def delete_file(self, file_id: str) -> None:
        await self.file(file_id)
        del self.stored[file_id]

    async def create_job(self, spec: JobSpec) -> Job:
        self.specs.append(spec)
        await self.file(spec.training_file)
        job = Job(
            id=f"ftjob-{len(self.all_jobs)}",
            status="queued",
            model=spec.model,
            training_file=spec.training_file,
            created_at=1_790_000_000 + len(self.all_jobs),
            seed=spec.seed or 42,
            n_epochs=spec.n_epochs or 3,
            batch_size=spec.batch_size or 4,
            learning_rate=spec.learning_rate or 2e-4,
            lora_rank=spec.lora_rank or 8,
            lora_alpha=spec.lora_alpha or 16.0,
            use_rslora=spec.use_rslora or False,
            lora_dropout=spec.lora_dropout or 0.0,
            method=spec.method,
            beta=spec.beta or 0.1,
            peft_method=spec.peft_method or "lora",
            target_modules=spec.target_modules or TARGET_MODULES,
            lr_scheduler_type=spec.lr_scheduler_type or "cosine",
            warmup_ratio=0.1 if spec.warmup_ratio is None else spec.warmup_ratio,
            max_grad_norm=1.0 if spec.max_grad_norm is None else spec.max_grad_norm,
            validation_file=spec.validation_file,
            eval_steps=spec.eval_steps or 10,
            early_stopping_patience=spec.early_stopping_patience or 0,
            suffix=spec.suffix,
            priority=spec.priority or 10,
            metadata=spec.metadata,
            total_steps=10,
        )
        self.all_jobs[job.id] = job
        self.all_events[job.id] = [JobEvent("ev-0", job.id, job.created_at, "info", "job created")]
        return job

    def update(self, job_id: str, **changes: object) -> Job:
        """Let a job go on: `update("ftjob-0", status="running", step=3)`."""
        self.all_jobs[job_id] = replace(self.all_jobs[job_id], **changes)  # type: ignore[arg-type]
        return self.all_jobs[job_id]

    def happen(self, job_id: str, message: str, **data: float) -> None:
        events = self.all_events[job_id]
        events.append(JobEvent(f"ev-{len(events)}", job_id, 1_790_000_000, "info", message, data))

    async def jobs(self, limit: int = 20, after: str | None = None) -> tuple[list[Job], bool]:
        return _page(list(self.all_jobs.values())[::-1], limit, after)

    async def job(self, job_id: str) -> Job:
        if job_id not in self.all_jobs:
            raise NotFound(f"no job '{job_id}'")
        return self.all_jobs[job_id]

    async def events(
        self, job_id: str, limit: int = 20, after: str | None = None
    ) -> tuple[list[JobEvent], bool]:
        await self.job(job_id)
        return _page(self.all_events[job_id][::-1], limit, after)

    async def cancel_job(self, job_id: str) -> Job:
        if (await self.job(job_id)).status == "succeeded":
            raise Conflict(f"job '{job_id}' has already succeeded")
        return self.update(job_id, status="cancelled", finished_at=1_790_000_500)

    async def pause_job(self, job_id: str) -> Job:
        if (job := await self.job(job_id)).status in ENDED:
            raise Conflict(f"job '{job_id}' has already {job.status}")
        return job if job.status == "running" else self.update(job_id, status="paused")

    async def resume_job(self, job_id: str) -> Job:
        if (job := await self.job(job_id)).status != "paused":
            raise Conflict(f"job '{job_id}' is {job.status}")
        return self.update(job_id, status="queued")

    async def set_priority(self, job_id: str, priority: int) -> Job:
        if (job := await self.job(job_id)).status in ENDED:
            raise Conflict(f"job '{job_id}' is {job.status}")
        return self.update(job_id, priority=priority)

    async def adapter_folder(self, job_id: str) -> Path:
        if (await self.job(job_id)).status != "succeeded":
            raise Conflict(f"job '{job_id}' has no adapter")
        return self.folder / "adapter"

    # -- operations ------------------------------------------------------------------------------

    def ready(self) -> bool:
        return self.is_ready

    async def status(self) -> Status:
        if not self.is_ready:
            raise NotReady("the appliance is starting")
        return self.status_now

    def timeline(self, since: int) -> Timeline:
        samples = [sample for sample in self.samples if sample.seq >= since]
        return Timeline(samples=samples, next=self.samples[-1].seq + 1 if self.samples else 0)

    async def load_adapter(self, name: str, folder: Path) -> None:
        raise AssertionError("tested against the real appliance")

    async def unload_adapter(self, name: str) -> None:
        raise AssertionError("tested against the real appliance")

    async def delete_model(self, name: str) -> None:
        kept = [model for model in self.status_now.models if model.id != name]
        if kept == self.status_now.models:
            raise NotFound(f"no job has made a model '{name}'", code="model_not_found")
        self.status_now = self.status_now.model_copy(update={"models": kept})

    async def change_policy(self, change: PolicyChange) -> Status:
        self.changes.append(change)
        slo = self.status_now.slo
        self.status_now = self.status_now.model_copy(
            update={
                "policy": change.policy or self.status_now.policy,
                "slo": slo.model_copy(update={"tpot_ms": change.slo_tpot_ms or slo.tpot_ms}),
            }
        )
        return self.status_now


def _page(items: list, limit: int, after: str | None) -> tuple[list, bool]:
    ids = [item.id for item in items]
    start = ids.index(after) + 1 if after else 0
    return items[start : start + limit], len(items) > start + limit


@asynccontextmanager
async def listening(
    port: FakeAppliance, number: int = 0, *, slo: Mapping[str, object] | None = None, **server: object
) -> AsyncIterator[Listener]:
    """The real server around a fake appliance, as `harli serve` runs it; on a free port unless told which."""
    settings = Settings(home=port.folder / "home", server=server, slo=slo or {})
    listener = await serve(create_app(port, settings), "127.0.0.1", number)
    try:
        yield listener
    finally:
        await listener.close()
