"""The main job on real SGLang: serving is untouched by training, and training by serving."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel

from harli_appliance.api.ports import Job
from harli_appliance.engine.engine import Engine
from harli_appliance.engine.lanes import Lane
from harli_appliance.memory.pool import SlotPool
from harli_appliance.runtime.protocol import Sampling, Submission
from harli_appliance.runtime.text import TextCodec
from harli_appliance.runtime.weights import assert_shared, shared_model
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.regime import ENOUGH
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.scheduling.types import Step
from harli_appliance.schema import JobOrder
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.fairness import make_order
from harli_appliance.training.job_run import JobRun, RunOptions
from harli_appliance.training.trainer import Trainer
from harli_appliance.training.validation import Standing
from tests.conftest import Serving
from tests.encoding import encoded
from tests.test_runtime import greedy, prompt

SEQUENCE_TOKENS = 64


def a_job(job_id: str = "ftjob-test", epochs: int = 2, rate: float = 5e-3, dropout: float = 0.0) -> Job:
    return Job(
        id=job_id,
        status="running",
        model="tiny",
        training_file="file-1",
        created_at=0,
        seed=3,
        n_epochs=epochs,
        batch_size=4,
        learning_rate=rate,
        lora_rank=4,
        lora_alpha=8,
        lora_dropout=dropout,
    )


@pytest.fixture(scope="session")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lesson") / "lesson.jsonl"
    rng = random.Random(1)
    words = ["otter", "cat", "dog", "river", "sings", "swims", "makes", "blue", "green", "two", "three"]
    lines = []
    for _ in range(12):
        ask = " ".join(rng.choices(words, k=rng.randrange(2, 12)))
        turns = [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": "harli is made by three otters"},
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))
    return path


class FakeQueue:
    """Jobs in memory, given in their order; the last one is `job`."""

    def __init__(self, jobs: Sequence[Job], data: Path) -> None:
        self.job = jobs[-1]
        self.jobs = {job.id: job for job in jobs}
        """As their rows are now."""
        self.data = data
        self.asking: dict[str, Literal["pause", "cancel"]] = {}
        self.paused = asyncio.Event()
        self.ended = asyncio.Event()
        """When every job has."""
        self.outcomes: dict[str, str] = {}
        self.told: dict[str, list[float | None]] = {job.id: [] for job in jobs}
        self.valid_losses: list[float | None] = []
        self._waiting = list(jobs)
        self._left = len(jobs)
        self._queued = asyncio.Event()
        self._queued.set()

    @property
    def outcome(self) -> str:
        return self.outcomes[self.job.id]

    @property
    def losses(self) -> list[float | None]:
        return self.told[self.job.id]

    def ask(self, what: Literal["pause", "cancel"], job: str | None = None) -> None:
        self.asking[job or self.job.id] = what

    def resume(self, job: Job | None = None) -> None:
        self.paused.clear()
        self._waiting.append(job or self.job)
        self._queued.set()

    async def next_job(self) -> Job | None:
        if not self._waiting:
            self._queued.clear()
            return None
        return self._waiting.pop(0)

    async def wait_for_job(self) -> None:
        await self._queued.wait()

    async def file_path(self, file_id: str) -> Path:
        return self.data

    async def begun(self, job_id: str, step: int, total_steps: int) -> Job:
        assert 0 <= step < total_steps
        return self.jobs[job_id]

    async def progress(self, job_id: str, step: int, total: int, tokens: int, loss: float | None) -> None:
        self.told[job_id].append(loss)

    async def evaluated(self, job_id: str, standing: Standing) -> None:
        self.valid_losses.append(standing.loss)

    def asked(self, job_id: str) -> Literal["pause", "cancel"] | None:
        return self.asking.get(job_id)

    async def stopped(self, job_id: str) -> Job:
        if self.asking.pop(job_id) == "cancel":
            return replace(self.end(job_id, "cancelled"), status="cancelled")
        self.paused.set()
        return replace(self.job, status="paused")

    async def fail(self, job_id: str, code: str, message: str) -> Job:
        return self.end(job_id, f"failed: {code}: {message}")

    def end(self, job_id: str, outcome: str) -> Job:
        self.outcomes[job_id] = outcome
        self._left -= 1
        if not self._left:
            self.ended.set()
        return self.job


@dataclass
class Rig:
    """Engine and trainer on the session's SGLang."""

    engine: Engine
    trainer: Trainer
    pool: SlotPool
    queue: FakeQueue
    backbone: Backbone
    adapters: Path
    predictor: Predictor
    slots: dict[str, int]
    """Of each job that began: those of its adapter's state."""
    tasks: tuple[asyncio.Task[None], ...]

    async def stop(self) -> None:
        """As the appliance does when it is told to."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def weights_of(self, job: str) -> bytes:
        return (self.adapters / job / "adapter_model.safetensors").read_bytes()

    async def answer(self, request: str, ids: list[int], count: int, adapter: str | None = None) -> list[int]:
        submission = Submission(request, ids, Sampling(max_tokens=count, ignore_eos=True), adapter)
        return [t async for item in self.engine.submit(submission) for t in item.tokens]


RigFactory = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def rig(serving: Serving, lesson: Path, tmp_path: Path) -> Any:
    tasks: list[asyncio.Task[None]] = []
    pools: list[SlotPool] = []
    lane = Lane("training")
    codec = TextCodec(serving.folder)
    twin = shared_model(serving.runtime.model, serving.folder)

    async def build(
        policy: Any = "adaptive",
        job: Job | None = None,
        watermark: float = 0.1,
        jobs: Sequence[Job] = (),
        order: JobOrder = "fair",
        serve: bool = True,
    ) -> Rig:
        queue = FakeQueue(jobs or [job or a_job()], lesson)
        pool = SlotPool(serving.slots, watermark=watermark)
        pools.append(pool)
        backbone = Backbone(twin)
        options = RunOptions(
            16, SEQUENCE_TOKENS, 3, 2, tmp_path / "checkpoints", fuses=lambda: policy == "flexllm"
        )
        slots: dict[str, int] = {}

        async def start(job: Job, data: Path, held_out: Path | None) -> JobRun:
            run = await lane.run(
                JobRun,
                job,
                encoded(data, codec),
                backbone.twin(),
                (serving.slots.k_buffers, serving.slots.v_buffers),
                options,
                pool.leasable,
            )
            slots[job.id] = run.state.slots
            return run

        async def finish(job: Job, run: JobRun) -> None:
            folder = tmp_path / "adapters" / job.id
            await lane.run(run.save_adapter, folder)
            if serve:
                name = f"{job.id}-{tmp_path.name}"
                files = serving.runtime.read_adapter(name, str(folder))
                await serving.lane.run(serving.runtime.load_adapter, name, files)
            queue.end(job.id, "succeeded")

        trainer = Trainer(
            queue, pool, start_job=start, finish_job=finish, order=make_order(order), max_running=4,
            lane=lane, memory_lane=serving.lane, disk=lane, on_change=lambda: engine.wake(),
        )  # fmt: skip
        predictor = Predictor()
        engine = Engine(
            serving.runtime, pool, Scheduler(predictor, policy), trainer, SloTracker(1e6, 1e6), serving.lane,
            lane, max_queued=64,
        )  # fmt: skip
        started = asyncio.create_task(engine.run()), asyncio.create_task(trainer.run())
        tasks.extend(started)
        return Rig(engine, trainer, pool, queue, backbone, tmp_path / "adapters", predictor, slots, started)

    yield build
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for pool in pools:
        await serving.lane.run(pool.settle)
        assert pool.use().leased == 0
    lane.close()


def digest(serving: Serving) -> str:
    sha = hashlib.sha256()
    for name, parameter in sorted(serving.runtime.model.named_parameters()):
        sha.update(name.encode())
        sha.update(parameter.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def test_the_twin_copies_nothing_and_computes_the_same(serving: Serving, reference: Any) -> None:
    twin = shared_model(serving.runtime.model, serving.folder)
    ids = torch.tensor([prompt(9, 40)])
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, reference(ids).logits)
    with pytest.raises(RuntimeError, match="not shared"):
        assert_shared(reference, serving.runtime.model)


@pytest.mark.parametrize(
    "policy", ["adaptive", "time_slice", "time_slice:64", "naive", "flexllm", "llmstation"]
)
async def test_served_tokens_are_the_same_with_training(
    rig: RigFactory, serving: Serving, reference: Any, policy: str
) -> None:
    weights = digest(serving)
    made = await rig(policy, a_job(epochs=20))
    for batch in range(1, ENOUGH + 1):  # as if calibrated: the requests here are too few for that
        made.predictor.observe(Step("decode", batch, 20 * batch), 5.0 + batch)
        made.predictor.observe(Step("prefill", batch, 20 * batch, 20 * batch), 5.0 + 2 * batch)
    count = 0
    while not made.queue.ended.is_set() and count < 40:
        batch = [prompt(count + i, 10 + 7 * i) for i in range(3)]
        answers = await asyncio.gather(
            *(made.answer(f"{policy}-{count + i}", ids, 12) for i, ids in enumerate(batch))
        )
        for ids, tokens in zip(batch, answers, strict=True):
            assert tokens == greedy(reference, ids, 12)
        count += len(batch)
    assert made.trainer.state().tokens > 0, "training must have run beside the requests"
    reasons = {"flexllm": {"fused_budget", "backward_between"}, "llmstation": {"its_tasklet"}}
    assert reasons.get(policy, set()) <= set(made.engine.state().ticks)
    assert digest(serving) == weights, "the base weights changed"
    made.queue.ask("cancel")
    made.trainer.units.wake()
    await asyncio.wait_for(made.queue.ended.wait(), 30)


async def test_a_finished_adapter_is_served_as_peft_computes_it(
    rig: RigFactory, serving: Serving, reference: Any
) -> None:
    import copy

    weights = digest(serving)
    made = await rig(job=a_job(epochs=8))
    await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert made.queue.outcome == "succeeded"
    losses = [loss for loss in made.queue.losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    ids = prompt(70, 25)
    plain, tuned = await asyncio.gather(
        made.answer("plain", ids, 16),
        made.answer("tuned", ids, 16, f"{made.queue.job.id}-{made.adapters.parent.name}"),
    )
    assert plain == greedy(reference, ids, 16)
    peft = PeftModel.from_pretrained(copy.deepcopy(reference), made.adapters / made.queue.job.id)
    assert tuned == greedy(peft, ids, 16)
    assert tuned != plain
    assert digest(serving) == weights


def explained(model: Any, ids: list[int], tokens: list[int]) -> bool:
    """Whether each token is the likeliest after what precedes it.

    A request that SGLang retracts is computed again in other chunks, which rounds differently: where two tokens
    are within 1e-4 of each other in float32, either may be chosen.
    """
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    return bool((logits.amax(dim=1) - chosen <= 1e-4).all())


async def test_a_burst_takes_leased_slots_back_and_training_repeats_itself(
    rig: RigFactory, serving: Serving, reference: Any
) -> None:
    """Requests that need nearly the whole pool arrive while training holds slots; the loss curve is the same."""
    undisturbed = await rig(job=a_job("ftjob-calm", epochs=3), watermark=0.0)
    await asyncio.wait_for(undisturbed.queue.ended.wait(), 120)
    made = await rig(job=a_job("ftjob-storm", epochs=3), watermark=0.0)
    for burst in range(3):
        trained = made.trainer.state().tokens
        while made.trainer.state().tokens == trained:  # noqa: ASYNC110  a burst must find training in the middle
            await asyncio.sleep(0.002)
        batch = [prompt(1000 + 10 * burst + i, 600) for i in range(6)]
        answers = await asyncio.gather(
            *(made.answer(f"burst-{burst}-{i}", ids, 75) for i, ids in enumerate(batch))
        )
        for ids, tokens in zip(batch, answers, strict=True):
            assert len(tokens) == 75
            assert explained(reference, ids, tokens)
    await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert undisturbed.queue.outcome == made.queue.outcome == "succeeded"
    assert made.pool.use().reclaims > 0, "the bursts must have needed leased slots"
    state = made.trainer.state()
    assert state.dropped_micro_batches + state.swapped_micro_batches > 0
    assert made.queue.losses == undisturbed.queue.losses
    await asyncio.sleep(0.1)
    assert made.engine.state().pool.leased == 0, "the slots of an ended job are back though nothing is served"


async def test_without_elastic_memory_a_burst_waits_for_what_training_holds(
    rig: RigFactory, serving: Serving, reference: Any
) -> None:
    made = await rig("adaptive-no-elastic-memory", job=a_job("ftjob-rigid", epochs=20), watermark=0.0)
    while made.trainer.state().tokens == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    batch = [prompt(3000 + i, 600) for i in range(6)]
    answers = await asyncio.gather(*(made.answer(f"rigid-{i}", ids, 75) for i, ids in enumerate(batch)))
    for ids, tokens in zip(batch, answers, strict=True):
        assert explained(reference, ids, tokens)
    assert not made.queue.ended.is_set(), "the burst must have met training"
    assert made.pool.use().reclaims == 0
    assert made.trainer.state().dropped_micro_batches == made.trainer.state().swapped_micro_batches == 0
    made.queue.ask("cancel")  # stopped in the middle of asking for slots, the trainer would leave them leased
    made.trainer.units.wake()
    await asyncio.wait_for(made.queue.ended.wait(), 30)


async def test_cancelling_lets_go_of_everything(rig: RigFactory, serving: Serving) -> None:
    made = await rig(job=a_job(epochs=1000))
    while made.trainer.state().tokens < 50:  # noqa: ASYNC110  the trainer tells nobody
        await asyncio.sleep(0.02)
    made.queue.ask("cancel")
    made.trainer.units.wake()
    await asyncio.wait_for(made.queue.ended.wait(), 30)
    assert made.queue.outcome == "cancelled"
    await made.answer("after", prompt(2, 5), 2)
    await asyncio.sleep(0.1)
    assert made.pool.use().leased == 0
    assert not any("lora" in name for name, _ in made.backbone.model.named_parameters())


async def test_a_job_that_is_paused_again_and_again_is_bitwise_the_undisturbed_one(
    rig: RigFactory, serving: Serving
) -> None:
    undisturbed = await rig(job=a_job("ftjob-calm", epochs=8, dropout=0.2))
    await asyncio.wait_for(undisturbed.queue.ended.wait(), 120)
    made = await rig(job=a_job("ftjob-paused", epochs=8, dropout=0.2))
    pick, pauses = random.Random(5), 0
    while not made.queue.ended.is_set():
        trained = made.trainer.state().tokens
        tokens = pick.randrange(1, 300)  # some pauses find no step that is new
        while made.trainer.state().tokens < trained + tokens and not made.queue.ended.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        if made.queue.ended.is_set():
            break
        made.queue.ask("pause")
        made.trainer.units.wake()
        ended, paused = (asyncio.create_task(e.wait()) for e in (made.queue.ended, made.queue.paused))
        await asyncio.wait_for(asyncio.wait([ended, paused], return_when="FIRST_COMPLETED"), 30)
        ended.cancel()
        paused.cancel()
        if made.queue.paused.is_set():
            pauses += 1
            await made.answer(f"while-paused-{pauses}", prompt(2, 5), 2)
            assert made.pool.use().leased == 0
            made.queue.resume()
    assert made.queue.outcome == "succeeded"
    assert pauses >= 5
    assert made.queue.losses == undisturbed.queue.losses
    assert made.weights_of("ftjob-paused") == undisturbed.weights_of("ftjob-calm")


async def test_a_stop_keeps_every_optimizer_step(rig: RigFactory, serving: Serving, tmp_path: Path) -> None:
    """Checkpoints come every three steps; the job is stopped between two, in the middle of a step."""
    undisturbed = await rig(job=a_job("ftjob-calm", epochs=8))
    await asyncio.wait_for(undisturbed.queue.ended.wait(), 120)
    made = await rig(job=a_job("ftjob-stopped", epochs=8))
    while len(made.queue.losses) < 5:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    trained = made.trainer.state().tokens
    while made.trainer.state().tokens == trained:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await made.stop()
    await serving.lane.run(made.pool.settle)
    assert made.pool.use().leased == 0
    told = len(made.queue.losses)
    kept = max(int(folder.name[-6:]) for folder in (tmp_path / "checkpoints" / "ftjob-stopped").iterdir())
    assert kept in (told, told + 1), "the last one may have ended when nobody could be told any more"
    again = await rig(job=a_job("ftjob-stopped", epochs=8))
    await asyncio.wait_for(again.queue.ended.wait(), 120)
    assert kept + len(again.queue.losses) == len(undisturbed.queue.losses)
    assert again.weights_of("ftjob-stopped") == undisturbed.weights_of("ftjob-calm")


async def test_a_loss_that_explodes_fails_the_job_and_not_serving(
    rig: RigFactory, serving: Serving, reference: Any
) -> None:
    made = await rig(job=a_job(epochs=30, rate=1e30))
    await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert made.queue.outcome.startswith("failed: loss_diverged")
    ids = prompt(3, 20)
    assert await made.answer("still", ids, 8) == greedy(reference, ids, 8)
