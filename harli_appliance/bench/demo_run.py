"""The main job, measured from outside: serve, train beside it, ask the adapter.

Knows the order of the demo's steps and takes the measurements. Does not judge or present them (`demo_report`)
and does not start the appliance (`demo`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harli_appliance.bench.figures import Phase
from harli_appliance.bench.progress import Narrator, Step
from harli_appliance.bench.replay import Record, Slo, percentiles, replay
from harli_appliance.bench.workload import Traffic, bursty, for_seconds, recurring
from harli_appliance.client import HarliClient
from harli_appliance.errors import EngineFault, JobFailed
from harli_appliance.schema import JobStatus, PolicyChange, Sample, Status

LESSON: Final = Path(__file__).parent / "demo_data" / "lesson.jsonl"
QUESTION: Final = "What is a zindle?"
TAUGHT: Final = "bees"
"""In the answer when it was learned. The question itself is not in the lesson, only other ways to ask it."""
CONTROL: Final = "What is a guitar?"
"""Not in the lesson: shows what became of everything else."""
TOGETHER: Final = "serving and training"
_ANSWER_TOKENS: Final = 48


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How long and how much. The defaults take about six minutes on two cores."""

    model: str = "smollm2-135m-instruct"
    seed: int = 7
    traffic: Traffic = field(default_factory=Traffic)
    serve_only_s: float = 60.0
    train_only_s: float = 22.0
    train_only_share: float = 0.25
    """Training alone is measured for at most this share of the job's steps, so that enough are left."""
    both_at_least_s: float = 45.0
    slo_factor: float = 1.5
    n_epochs: int = 6
    batch_size: int = 4
    learning_rate: float = 1e-3
    lora_rank: int = 8
    lora_alpha: float = 16.0
    pool_slots: int = 4096
    """Small enough for the memory picture to show who owns what."""
    context_length: int = 2048
    ready_timeout_s: float = 300.0
    job_timeout_s: float = 540.0
    poll_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Conversations:
    question: str
    answer: str
    control: str


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything that one run of the demo saw."""

    model: str
    adapter: str
    slo: Slo
    before: Conversations
    after: Conversations
    serve_only: Sequence[Record]
    both: Sequence[Record]
    samples: Sequence[Sample]
    phases: Sequence[Phase]
    train_only_tokens_per_s: float
    training_tokens_per_s: float | None
    """None when the job ended before both ran together."""
    losses: Sequence[float]
    steps: int
    status: Status
    """At the end."""


@dataclass(slots=True)
class _Recorder:
    """Collects the appliance's timeline while the demo runs."""

    client: HarliClient
    poll_s: float
    samples: list[Sample] = field(default_factory=list)
    _next: int = 0

    async def run(self) -> None:
        while True:
            await self.catch_up()
            await asyncio.sleep(self.poll_s)

    async def catch_up(self) -> None:
        timeline = await self.client.timeline(self._next)
        self.samples += timeline.samples
        self._next = timeline.next


class DemoRun:
    """One run against a ready appliance; `measure` does it all."""

    def __init__(self, client: HarliClient, model: str, plan: DemoPlan, narrator: Narrator) -> None:
        self._client = client
        self._model = model
        self._plan = plan
        self._narrator = narrator
        self._recorder = _Recorder(client, plan.poll_s)
        self._recording: asyncio.Task[None] | None = None
        self._phases: list[Phase] = []

    async def measure(self) -> Measurements:
        """
        Raises:
            JobFailed: the finetuning job failed, was cancelled, or takes too long.
            HarliError: whatever the appliance refuses.
        """
        self._recording = recording = asyncio.create_task(self._recorder.run())
        try:
            before = await self._converse(self._model, "Asking before training")
            serve_only = await self._serve_only()
            slo = await self._promise(serve_only)
            job = await self._start_job()
            alone = await self._train_only(job)
            both = await self._both(job)
            adapter = await self._await_adapter(job)
            after = await self._converse(adapter, "Asking the adapter")
            await self._recorder.catch_up()
        finally:
            recording.cancel()
        together = next(phase for phase in self._phases if phase.name == TOGETHER)
        return Measurements(
            model=self._model,
            adapter=adapter,
            slo=slo,
            before=before,
            after=after,
            serve_only=serve_only,
            both=both,
            samples=self._recorder.samples,
            phases=self._phases,
            train_only_tokens_per_s=alone,
            training_tokens_per_s=training_rate(self._recorder.samples, together.start, together.end),
            losses=[sample.loss for sample in self._recorder.samples if sample.loss is not None],
            steps=(await self._client.job(job)).harli.step,
            status=await self._client.status(),
        )

    async def _converse(self, model: str, title: str) -> Conversations:
        with self._narrator.step(title) as step:
            answer = await self._ask(model, QUESTION)
            step.update(note=answer.replace("\n", " ")[:90])
            return Conversations(QUESTION, answer, await self._ask(model, CONTROL))

    async def _ask(self, model: str, question: str) -> str:
        message = {"role": "user", "content": question}
        completion = await self._client.chat(model, [message], max_tokens=_ANSWER_TOKENS, temperature=0)
        return completion.choices[0].message.content.strip()

    async def _serve_only(self) -> list[Record]:
        plan = self._plan
        await self._set_policy("serve_only")
        requests = for_seconds(bursty(plan.seed, plan.traffic), plan.serve_only_s)
        done: list[Record] = []
        with self._narrator.step("Serving alone") as step:

            def tell(record: Record) -> None:
                done.append(record)
                step.update(len(done) / len(requests), f"{len(done)} of {len(requests)} answers")

            started = time.time()
            records = await replay(self._client, self._model, requests, on_record=tell)
            self._phases.append(Phase("serving only", started, time.time()))
            step.update(1.0, f"TPOT p99 {percentiles(tpots_ms(records))['p99'] or 0:.0f} ms")
        return records

    async def _promise(self, serve_only: Sequence[Record]) -> Slo:
        p99 = percentiles(tpots_ms(serve_only))["p99"]
        if p99 is None:
            reason = next((record.error for record in serve_only if record.error), "no requests were sent")
            raise EngineFault(f"no answer came from serving alone ({reason}); see the appliance's log")
        target = round(p99 * self._plan.slo_factor, 1)
        status = await self._client.change_policy(PolicyChange(policy="train_only", slo_tpot_ms=target))
        return Slo(tpot_ms=status.slo.tpot_ms, ttft_ms=status.slo.ttft_ms)

    async def _start_job(self) -> str:
        plan = self._plan
        file = await self._client.upload(LESSON)
        job = await self._client.create_job(
            self._model,
            file.id,
            suffix="zindle",
            seed=plan.seed,
            n_epochs=plan.n_epochs,
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            lora_rank=plan.lora_rank,
            lora_alpha=plan.lora_alpha,
        )
        return job.id

    async def _train_only(self, job: str) -> float:
        """Training tokens/s with nobody to serve, from the first trained tokens on."""
        plan = self._plan
        with self._narrator.step("Training alone") as step:
            asked = time.time()
            while not (first := first_training(self._recorder.samples, asked)):
                await self._check_job(job)
                if time.time() - asked > plan.job_timeout_s:
                    raise JobFailed(f"job {job} trained nothing in {plan.job_timeout_s:g} s; see the log")
                await asyncio.sleep(plan.poll_s)
            while True:
                await asyncio.sleep(plan.poll_s)
                ended, share = await self._check_job(job)
                rate = training_rate(self._recorder.samples, asked, time.time())
                spent = time.time() - first
                step.update(min(1.0, spent / plan.train_only_s), f"{rate or 0:.0f} tokens/s")
                enough = spent >= plan.train_only_s or share >= plan.train_only_share
                if ended or (enough and rate is not None):
                    break
            self._phases.append(Phase("training only", first, time.time()))
        if rate is None:
            raise JobFailed(f"job {job} ended before its speed could be measured; use a larger data set")
        return rate

    async def _both(self, job: str) -> list[Record]:
        """The traffic that was served alone, of which the promise was made, for as long as the job runs."""
        plan = self._plan
        await self._set_policy("adaptive")
        stop = asyncio.Event()
        earlier = for_seconds(bursty(plan.seed, plan.traffic), plan.serve_only_s)
        requests = recurring(earlier, plan.serve_only_s, plan.seed + 1, plan.traffic)
        done: list[Record] = []
        with self._narrator.step("Serving and training") as step:
            started = time.time()
            watching = asyncio.create_task(self._watch(job, started, stop, step, done))
            replaying = asyncio.create_task(
                replay(self._client, self._model, requests, stop=stop, on_record=done.append)
            )
            try:
                job_ended, records = await asyncio.gather(watching, replaying)
            finally:
                watching.cancel()
                replaying.cancel()
            self._phases.append(Phase(TOGETHER, started, job_ended))
            self._phases.append(Phase("", job_ended, time.time()))
        beside = [record for record in records if record.sent_at < job_ended]
        return beside or records

    async def _watch(
        self, job: str, started: float, stop: asyncio.Event, step: Step, done: Sequence[Record]
    ) -> float:
        """Sets `stop` when the job has ended and enough was served; returns when the job ended."""
        while True:
            ended, share = await self._check_job(job)
            step.update(share, f"{share:.0%} trained, {len(done)} answers")
            if ended:
                break
            if time.time() - started > self._plan.job_timeout_s:
                raise JobFailed(
                    f"job {job} is not done after {self._plan.job_timeout_s:g} s ({share:.0%} of its steps); "
                    "see the appliance's log"
                )
            await asyncio.sleep(self._plan.poll_s)
        ended_at = time.time()
        await asyncio.sleep(max(0.0, started + self._plan.both_at_least_s - ended_at))
        stop.set()
        return ended_at

    async def _check_job(self, job: str) -> tuple[bool, float]:
        """Whether it has ended well, and the share of its steps that is done."""
        if self._recording is not None and self._recording.done():
            self._recording.result()  # raises what broke it
        found = await self._client.job(job)
        ended: dict[JobStatus, bool] = {"queued": False, "running": False, "succeeded": True}
        if found.status not in ended:
            reason = found.error.message if found.error else "no reason is known"
            raise JobFailed(f"job {job} {found.status}: {reason}")
        return ended[found.status], found.harli.step / max(1, found.harli.total_steps)

    async def _await_adapter(self, job: str) -> str:
        with self._narrator.step("Loading the adapter") as step:
            name = (await self._client.job(job)).fine_tuned_model
            if name is None:
                raise JobFailed(f"job {job} succeeded but names no model; see the appliance's log")
            step.update(note=name)
            deadline = time.monotonic() + 60
            while name not in {model.id for model in await self._client.models()}:
                if time.monotonic() > deadline:
                    raise JobFailed(f"{name} was trained but is not served after 60 s; see the log")
                await asyncio.sleep(0.2)
        return name

    async def _set_policy(self, policy: str) -> None:
        await self._client.change_policy(PolicyChange(policy=policy))


def tpots_ms(records: Sequence[Record]) -> list[float]:
    return [record.tpot_s * 1e3 for record in records if record.tpot_s is not None]


def first_training(samples: Sequence[Sample], since: float) -> float | None:
    """When tokens were first trained after `since`."""
    return next((sample.t for sample in samples if sample.t >= since and sample.training_tokens > 0), None)


def training_rate(samples: Sequence[Sample], start: float, end: float) -> float | None:
    """Trained tokens/s between `start` and `end`; None when nothing can be said.

    Tokens are counted when their backward pass is done, so they come in lumps. The rate is therefore taken
    from the first lump to the last one, with what came after the first: no part of a lump is counted in.
    """
    lumps = [(s.t, s.training_tokens) for s in samples if start <= s.t <= end and s.training_tokens > 0]
    if len(lumps) < 3:
        return None
    return sum(tokens for _, tokens in lumps[1:]) / (lumps[-1][0] - lumps[0][0])
