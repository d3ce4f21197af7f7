"""The engine against a scripted runtime: faults, aborts, overload, and the order of a tick."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.engine.engine import FAULTS_TO_DEGRADE, Engine
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import EngineFault, Overloaded, UsageError
from harli_appliance.memory.pool import Lease, SlotCounts, SlotPool
from harli_appliance.runtime.protocol import (
    NewTokens,
    QueueDepth,
    Sampling,
    StepOutcome,
    StepPlan,
    Submission,
)
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.scheduling.types import Outlook, Queue


class ScriptedRuntime:
    """Every request counts up from 0, one token a step; `break_on` makes steps with that request fail."""

    context_length = 1000

    def __init__(self) -> None:
        self.live: dict[str, tuple[Submission, int]] = {}
        self.ended: list[NewTokens] = []
        self.break_on: str | None = None
        self.blocked: Callable[[], bool] = lambda: False
        self.prompts: list[bool] = []

    def check(self, submission: Submission) -> None:
        if max(submission.prompt, default=0) >= 1000:
            raise UsageError("no such token", param="prompt")

    def submit(self, submission: Submission) -> None:
        if submission.id == "refuse-me":
            raise ValueError("no such adapter")
        self.live[submission.id] = (submission, 0)

    def abort(self, request_id: str) -> None:
        if self.live.pop(request_id, None):
            self.ended.append(NewTokens(request_id, (), "abort", error="Aborted"))

    def plan(self, *, prompts: bool = True) -> StepPlan | None:
        self.prompts.append(prompts)
        if not self.live or self.blocked():
            return None
        return StepPlan("decode", tuple(self.live), 0, 10, None)

    def execute(self, plan: StepPlan) -> StepOutcome:
        if self.break_on in plan.requests:
            raise RuntimeError("kernel exploded")
        brought = []
        for request in plan.requests:
            submission, count = self.live[request]
            done = count + 1 == submission.sampling.max_tokens
            brought.append(NewTokens(request, (count,), "length" if done else None))
            self.live[request] = (submission, count + 1)
            if done:
                del self.live[request]
        return StepOutcome(0.001, tuple(brought))

    def recover(self, plan: StepPlan, error: Exception) -> tuple[NewTokens, ...]:
        for request in plan.requests:
            del self.live[request]
        return tuple(NewTokens(request, (), "error", error=str(error)) for request in plan.requests)

    def drain(self) -> tuple[NewTokens, ...]:
        ended, self.ended = tuple(self.ended), []
        return ended

    def depth(self) -> QueueDepth:
        return QueueDepth(0, len(self.live)) if self.blocked() else QueueDepth(len(self.live), 0)


class NoSlots:
    size = 100

    def counts(self) -> SlotCounts:
        return SlotCounts(100, 0, 0)

    def demand(self) -> int:
        return 0

    def take(self, count: int, *, evict: bool) -> Tensor | None:
        return torch.arange(count)

    def give(self, indices: Tensor) -> None:
        return None


class NoTraining:
    """A trainer without work that notes what it was allowed."""

    def __init__(self) -> None:
        self.allowed: list[int] = []
        self.places: list[Any] = []
        self.units = self

    def outlook(self) -> Outlook:
        return Outlook(False)

    def launch(self, units: int, lane: Any = None, place: Any = None) -> asyncio.Future[None]:
        self.allowed.append(units)
        self.places.append(place)
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def state(self) -> Any:
        raise AssertionError("not asked for in these tests")


@pytest.fixture
async def rig() -> AsyncIterator[tuple[Engine, ScriptedRuntime, NoTraining]]:
    runtime, trainer = ScriptedRuntime(), NoTraining()
    inference, training = Lane("inference"), Lane("training")
    pool = SlotPool(NoSlots(), watermark=0.0)
    engine = Engine(
        runtime,
        pool,
        Scheduler(Predictor(), "adaptive"),
        trainer,  # type: ignore[arg-type]
        SloTracker(100, 1000),
        inference,
        training,
        max_queued=3,
    )
    task = asyncio.create_task(engine.run())
    yield engine, runtime, trainer
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    inference.close()
    training.close()


Rig = tuple[Engine, ScriptedRuntime, NoTraining]


def ask(name: str, count: int = 5) -> Submission:
    return Submission(name, [1, 2, 3], Sampling(max_tokens=count))


async def tokens(engine: Engine, submission: Submission) -> list[int]:
    return [token async for item in engine.submit(submission) for token in item.tokens]


async def test_tokens_arrive_in_order_and_end(rig: Rig) -> None:
    engine, _, _ = rig
    found = await asyncio.gather(*(tokens(engine, ask(f"r{i}", 4 + i)) for i in range(3)))
    assert found == [list(range(4 + i)) for i in range(3)]
    assert (engine.slo.requests, engine.slo.failed) == (3, 0)


async def test_a_fault_ends_its_batch_and_nothing_else(rig: Rig) -> None:
    engine, runtime, _ = rig
    runtime.break_on = "bad"
    with pytest.raises(EngineFault, match="kernel exploded"):
        await tokens(engine, ask("bad"))
    assert await tokens(engine, ask("good")) == [0, 1, 2, 3, 4]
    assert engine.slo.failed == 1
    assert not engine.degraded


async def test_five_faults_in_a_minute_are_degraded(rig: Rig) -> None:
    engine, runtime, _ = rig
    for index in range(5):
        assert not engine.degraded
        runtime.break_on = f"bad-{index}"
        with pytest.raises(EngineFault):
            await tokens(engine, ask(f"bad-{index}"))
    assert engine.degraded
    assert await tokens(engine, ask("good")) == [0, 1, 2, 3, 4]


async def test_a_step_that_cannot_be_cleaned_up_ends_its_requests_and_nothing_else(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runtime, _ = rig

    def recover(plan: StepPlan, error: Exception) -> tuple[NewTokens, ...]:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(runtime, "recover", recover)
    runtime.break_on = "bad"
    with pytest.raises(EngineFault, match="kernel exploded"):
        await asyncio.wait_for(tokens(engine, ask("bad")), 10)
    assert await asyncio.wait_for(tokens(engine, ask("good")), 10) == [0, 1, 2, 3, 4]
    assert not runtime.live, "the runtime has let go of both"
    assert engine.slo.failed == 1


async def test_nobody_waits_when_planning_fails_again_and_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runtime, _ = rig
    failures = 0

    def plan(*, prompts: bool = True) -> StepPlan | None:
        nonlocal failures
        failures += 1
        raise RuntimeError("CUDA error")

    monkeypatch.setattr("harli_appliance.engine.engine.FAULT_PAUSE_S", 0.001)
    with monkeypatch.context() as broken:
        broken.setattr(runtime, "plan", plan)
        with pytest.raises(EngineFault, match="cannot go on"):
            await asyncio.wait_for(tokens(engine, ask("waiting", 10_000_000)), 10)
    assert failures >= FAULTS_TO_DEGRADE
    assert engine.degraded
    assert await asyncio.wait_for(tokens(engine, ask("good")), 10) == [0, 1, 2, 3, 4]
    assert not runtime.live


async def test_planning_that_fails_once_ends_no_request(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runtime, _ = rig
    plan, looks = runtime.plan, iter(range(20))

    def failing(*, prompts: bool = True) -> StepPlan | None:
        if next(looks, 0) in (1, 2, 4, 5, 7, 8):
            raise RuntimeError("out of memory")
        return plan(prompts=prompts)

    monkeypatch.setattr("harli_appliance.engine.engine.FAULT_PAUSE_S", 0.001)
    monkeypatch.setattr(runtime, "plan", failing)
    assert await asyncio.wait_for(tokens(engine, ask("patient")), 10) == [0, 1, 2, 3, 4]


async def test_a_request_that_the_runtime_refuses_fails_alone(rig: Rig) -> None:
    engine, _, _ = rig
    good = asyncio.create_task(tokens(engine, ask("fine")))
    with pytest.raises(EngineFault, match="no such adapter"):
        await tokens(engine, ask("refuse-me"))
    assert await good == [0, 1, 2, 3, 4]


async def test_what_cannot_be_served_as_asked_is_refused_before_it_is_queued(rig: Rig) -> None:
    engine, runtime, _ = rig
    with pytest.raises(UsageError, match="no such token"):
        engine.submit(Submission("bad", [1, 2000], Sampling()))
    assert engine.slo.requests == 0
    assert not runtime.live


async def test_an_aborted_request_ends_quietly(rig: Rig) -> None:
    engine, runtime, _ = rig
    stream = engine.submit(ask("leaving", 10_000_000))
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            stream.abort()
            stream.abort()
    assert seen >= 3
    assert not runtime.live
    assert engine.slo.failed == 0, "a client that leaves is not a failure"


async def test_too_many_waiting_requests_are_refused(rig: Rig) -> None:
    engine, _, _ = rig
    streams = [engine.submit(ask(f"r{i}", 2)) for i in range(3)]  # no tick has run between these
    with pytest.raises(Overloaded):
        engine.submit(ask("one too many"))
    for stream in streams:
        assert [item.tokens async for item in stream] == [(0,), (1,)]


async def test_training_is_told_at_every_tick(rig: Rig) -> None:
    engine, _, trainer = rig
    await tokens(engine, ask("r", 5))
    assert len(trainer.allowed) >= 5
    assert set(trainer.allowed) == {0}


async def test_requests_never_wait_for_slots_that_training_holds(rig: Rig) -> None:
    """The forecast sees enough, but the runtime does not admit while anything is leased."""
    engine, runtime, _ = rig
    pool = engine._pool
    leases: list[Lease] = []
    lease = pool.grant(10, lambda: leases[0].release())
    assert lease is not None
    leases.append(lease)
    runtime.blocked = lambda: pool.use().leased > 0
    found = await asyncio.wait_for(tokens(engine, ask("waiting")), 10)
    assert found == [0, 1, 2, 3, 4]
    assert lease.revoked


async def test_requests_that_wait_for_their_grammar_take_nothing_from_training(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runtime, _ = rig
    leases: list[Lease] = []
    lease = engine._pool.grant(10, lambda: leases[0].release())
    assert lease is not None
    leases.append(lease)
    looks = iter(range(10))
    runtime.blocked = lambda: next(looks, None) is not None
    monkeypatch.setattr(runtime, "depth", lambda: QueueDepth(0, len(runtime.live), len(runtime.live)))
    assert await asyncio.wait_for(tokens(engine, ask("compiling")), 10) == [0, 1, 2, 3, 4]
    assert not lease.revoked


async def test_requests_that_wait_for_others_are_looked_at_again(rig: Rig) -> None:
    engine, runtime, _ = rig
    looks = iter(range(20))
    runtime.blocked = lambda: next(looks, None) is not None
    assert await asyncio.wait_for(tokens(engine, ask("patient")), 10) == [0, 1, 2, 3, 4]


async def test_prompts_are_held_when_the_policy_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runtime, _ = rig
    queues: list[Queue | None] = []

    def admits(queue: Queue | None, outlook: Outlook) -> str:
        queues.append(queue)
        return "answers" if len(queues) % 2 else "all"

    monkeypatch.setattr(engine._scheduler, "admits", admits)
    assert await tokens(engine, ask("held", 3)) == [0, 1, 2]
    assert {*runtime.prompts[1::2]} != {*runtime.prompts[2::2]}, "it alternates as the policy does"
    waiting = [queue for queue in queues if queue is not None]
    assert waiting[0].answering == []
    assert 0 < waiting[0].patience_ms <= 500, "half of the promised second"
    assert any(queue is None for queue in queues), "its first token is there"


async def test_steps_beside_other_work_than_units_teach_nothing_of_running_beside_units() -> None:
    learned: list[bool] = []

    class Noting(Predictor):
        def observe(self, *args: Any, corun: bool, **named: Any) -> None:
            learned.append(corun)

    class Slow(ScriptedRuntime):
        def execute(self, plan: StepPlan) -> StepOutcome:
            time.sleep(0.01)
            found = super().execute(plan)
            return StepOutcome(0.01, found.tokens)

    inference, training = Lane("inference"), Lane("training")
    engine = Engine(
        Slow(), SlotPool(NoSlots(), watermark=0.0), Scheduler(Noting(), "adaptive"), NoTraining(),  # type: ignore[arg-type]
        SloTracker(100, 1000), inference, training, max_queued=3,
    )  # fmt: skip
    running = asyncio.create_task(engine.run())
    go_on = threading.Event()
    training.submit(go_on.wait, 10)  # a file is encoded, say
    await tokens(engine, ask("r", 3))
    assert learned == []
    go_on.set()
    training.submit(int).result(10)
    await tokens(engine, ask("s", 3))
    assert set(learned) == {False}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    inference.close()
    training.close()
