"""The trainer on lanes whose work goes on after they return, as a GPU's does: what is over before what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.engine.engine import Engine
from harli_appliance.engine.lanes import Lane
from harli_appliance.memory.pool import Lease, SlotCounts, SlotPool
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.scheduling.types import Decision, Split
from harli_appliance.training.fairness import FirstCome, Order
from harli_appliance.training.trainer import Trainer
from harli_appliance.training.units import WorkUnit
from tests.test_engine import NoTraining, ScriptedRuntime, ask, tokens


class Device:
    """What is still running, by lane; `happened` is the order of things."""

    def __init__(self) -> None:
        self.running: dict[str, list[str]] = {}
        self.happened: list[str] = []


class DeviceLane:
    """Runs at once, but on the device the last piece goes on until it is waited for."""

    def __init__(self, name: str, device: Device, ahead: int) -> None:
        self._name, self._device, self._ahead = name, device, ahead
        device.running[name] = []

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        others = [name for name, pieces in self._device.running.items() if pieces and name != self._name]
        assert not others, f"{self._name} begins while {others} still work"
        found = function(*args)
        self._device.running[self._name] = ["piece"] * self._ahead
        await asyncio.sleep(0)
        return found

    async def drain(self) -> None:
        self._device.running[self._name] = []


class Slots:
    size = 100

    def counts(self) -> SlotCounts:
        return SlotCounts(100, 0, 0)

    def demand(self) -> int:
        return 0

    def take(self, count: int, *, evict: int) -> Tensor:
        return torch.arange(count)

    take_contiguous = take

    def give(self, indices: Tensor) -> None:
        return None


class Batch:
    """Three units of one micro-batch."""

    fusible_tokens = 0
    worked, tokens = 0.0, 8
    swap_bytes = 1 << 40  # too many to be copied anywhere

    def __init__(self, device: Device) -> None:
        self._device = device
        self.left = 3

    def next_unit(self, window: int, layers: int) -> WorkUnit | None:
        return WorkUnit("forward", self._unit) if self.left else None

    def _unit(self) -> None:
        self.left -= 1
        self.worked += self.tokens / 3
        self._device.happened.append("unit")

    def units_left(self, window: int) -> int:
        return self.left

    def keep_outputs(self, slots: list[Tensor]) -> None:
        assert [len(lent) for lent in slots] == [4, 4]

    def drop_outputs(self, number: int) -> None:
        self._device.happened.append(f"without {number}")


def fake_run(device: Device) -> Any:
    def ran(what: str, *_: object) -> Any:
        device.happened.append(what)
        run.step, run.done = (1, True) if what == "step" else (run.step, run.done)
        return Batch(device)

    run = SimpleNamespace(
        job=SimpleNamespace(id="job"),
        state=SimpleNamespace(slots=5, bytes=0, place=lambda slots: None, park=lambda: None),
        step=0,
        total_steps=1,
        trained_tokens=0,
        loss=None,
        window_tokens=8,
        checkpoint_due=False,
        has_unkept_steps=False,
        micro_batches=lambda: 1,
        slots_of=lambda index: 10,
        spared_slots_of=lambda index: 4,
        layers=2,
        ends_step=lambda index: True,
        begin=partial(ran, "begin"),
        finish=partial(ran, "finish"),
        evaluating=False,
        done=False,
        end_round=partial(ran, "step"),
        write=lambda: None,
        close=lambda: None,
    )
    return run


class Queue:
    def __init__(self) -> None:
        self.jobs = [SimpleNamespace(id="job", training_file="file", validation_file=None, priority=1)]
        self.done = asyncio.Event()

    async def next_job(self) -> Any:
        return self.jobs.pop() if self.jobs else None

    async def wait_for_job(self) -> None:
        await asyncio.Event().wait()

    async def file_path(self, file_id: str) -> Any:
        return None

    async def progress(self, *_: object) -> None:
        return None

    async def begun(self, *_: object) -> Any:
        return SimpleNamespace(priority=1)

    def asked(self, job_id: str) -> None:
        return None

    async def event(self, job_id: str, level: str, message: str) -> None:
        return None

    async def fail(self, job_id: str, code: str, message: str) -> None:
        raise AssertionError(message)


def watched(grant: Callable[..., Any], device: Device) -> Callable[..., Any]:
    """`grant`, whose leases may be given back only when nothing runs on the device."""

    def granted(*args: Any, **named: Any) -> Any:
        lease = grant(*args, **named)
        if isinstance(lease, list):
            return [watch(each) for each in lease]
        return watch(lease)

    def watch(lease: Lease) -> Any:
        give = lease.release

        def release() -> None:
            assert not any(device.running.values()), "the device still works on these slots"
            give()

        lease.release = release  # type: ignore[method-assign]
        return lease

    return granted


def trainer_of(
    queue: Queue, pool: SlotPool, run: Any, lane: DeviceLane, order: Order | None = None, **more: Any
) -> Trainer:
    """A trainer of one job, which sets `queue.done` when it ends; `run` may be what makes its runs."""

    async def start(job: Any, path: Any, held_out: Any) -> Any:
        return run() if callable(run) else run

    async def finish(job: Any, run: Any) -> None:
        queue.done.set()

    trainer = Trainer(
        queue,  # type: ignore[arg-type]
        pool,
        start_job=start,
        finish_job=finish,
        order=order or FirstCome(),
        max_running=1,
        lane=lane,
        memory_lane=DeviceLane("memory", Device(), ahead=0),
        on_change=lambda: trainer.units.wake(),
        **{"disk": DeviceLane("disk", Device(), ahead=0), **more},
    )
    return trainer


async def answer_two_tokens(
    scheduler: Scheduler, trainer: NoTraining, runtime: ScriptedRuntime, **more: Any
) -> None:
    """An engine on lanes "inference" and "training" answers one request, and is stopped."""
    inference, training = Lane("inference"), Lane("training")
    engine = Engine(
        runtime, SlotPool(Slots(), watermark=0.0), scheduler, trainer,  # type: ignore[arg-type]
        SloTracker(100, 1000), inference, training, max_queued=3, **more,
    )  # fmt: skip
    task = asyncio.create_task(engine.run())
    await tokens(engine, ask("r", 2))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    inference.close()
    training.close()


async def train(trainer: Trainer, queue: Queue, **allowed: Any) -> None:
    """One unit at a time, until the job has ended."""
    task = asyncio.create_task(trainer.run())
    async with asyncio.timeout(60):
        while not queue.done.is_set():
            trainer.units.launch(1, **allowed)
            await asyncio.sleep(0)
            assert not task.done(), task.exception()
    task.cancel()


@pytest.mark.parametrize("turns", [False, True], ids=["on its own lane", "taking turns"])
async def test_a_lease_is_given_back_when_the_device_is_done_with_it(turns: bool) -> None:
    device, queue, half = Device(), Queue(), Split("64+68", 64 / 132, 68 / 132)
    paces: list[tuple[float, float, Split | None]] = []
    home, serving = DeviceLane("training", device, ahead=1), DeviceLane("inference", device, ahead=0)
    pool = SlotPool(Slots(), watermark=0.0)
    told = lambda *pace: paces.append(pace)  # noqa: E731
    trainer = trainer_of(queue, pool, fake_run(device), home, on_pace=told)
    pool.grant = watched(pool.grant, device)  # type: ignore[method-assign]
    pool.grant_contiguous = watched(pool.grant_contiguous, device)  # type: ignore[method-assign]
    pool.grant_spare = watched(pool.grant_spare, device)  # type: ignore[method-assign]
    await train(trainer, queue, lane=serving if turns else home, place=half)
    assert device.happened == ["begin", "unit", "unit", "unit", "finish", "step"]
    pool.settle()
    assert pool.leases() == ()
    ((tokens, seconds, place),) = paces
    assert (tokens, place) == (8.0, half)
    whole = sum(times.total_ms for kind, times in trainer.units.times.items() if kind != "step")
    assert whole == pytest.approx(1e3 * seconds * half.training), (
        "as long as it would take on the whole device"
    )


async def test_serving_gets_back_what_could_be_spared_and_the_work_goes_on() -> None:
    device, queue = Device(), Queue()
    home, serving = DeviceLane("training", device, ahead=1), DeviceLane("inference", device, ahead=1)
    pool, run = SlotPool(Slots(), watermark=0.0), fake_run(device)
    pool.grant_spare = watched(pool.grant_spare, device)  # type: ignore[method-assign]

    class Wanted(Batch):
        def _unit(self) -> None:
            super()._unit()
            if self.left == 2:
                pool.revoke(3)

    run.begin = lambda index, slots: Wanted(device)
    await train(trainer_of(queue, pool, run, home), queue, lane=serving)
    assert device.happened == ["unit", "without 1", "unit", "unit", "finish", "step"]
    assert pool.use().reclaims == 1


async def test_serving_gets_the_state_of_a_job_back_while_its_checkpoint_is_written() -> None:
    device, queue = Device(), Queue()
    home, disk, serving = Lane("training"), Lane("disk"), DeviceLane("inference", device, ahead=0)
    pool, run = SlotPool(Slots(), watermark=0.0), fake_run(device)
    trainer = trainer_of(queue, pool, run, home, disk=disk)  # type: ignore[arg-type]
    writing, go_on = threading.Event(), threading.Event()

    def end_round() -> None:
        run.step, run.checkpoint_due, run.has_unkept_steps = 1, True, True

    def checkpoint() -> None:
        run.has_unkept_steps, run.checkpoint_due, run.done = False, False, True

    def write() -> None:
        writing.set()
        assert go_on.wait(10)

    run.end_round, run.checkpoint, run.write = end_round, checkpoint, write
    training = asyncio.create_task(train(trainer, queue, lane=serving))
    assert await asyncio.to_thread(writing.wait, 10)
    assert not trainer.units.ready, "nobody waits for it"
    pool.settle()
    (state,) = pool.revoke(1)
    async with asyncio.timeout(5):
        await state.released()
    go_on.set()
    await training
    assert trainer.units.times["step"].count == 1, "a checkpoint is no unit"
    home.close()
    disk.close()


async def test_a_state_is_parked_when_the_lane_that_it_was_used_on_is_done() -> None:
    """Serving wants the slots back while a unit that was launched on its own lane is still running."""
    device, queue, leases = Device(), Queue(), []
    home, serving = DeviceLane("training", device, ahead=1), DeviceLane("inference", device, ahead=1)
    pool, run = SlotPool(Slots(), watermark=0.0), fake_run(device)
    run.state.bytes = 1
    run.state.park = lambda: device.happened.append("park")
    run.state.place = lambda slots: device.happened.append("place")
    grant = pool.grant_contiguous
    pool.grant_contiguous = lambda *args, **named: leases.append(grant(*args, **named)) or leases[-1]  # type: ignore[method-assign, func-returns-value]

    class Revoking(Batch):
        has_added = False

        def _unit(self) -> None:
            super()._unit()
            if len(leases) == 1:
                leases[0].revoke()

    run.begin, run.drop = lambda index, slots: Revoking(device), lambda index, batch: 0
    await train(trainer_of(queue, pool, run, home), queue, lane=serving)
    assert device.happened[:4] == ["place", "unit", "park", "place"]


async def test_lanes_are_arranged_before_a_step_is_launched() -> None:
    happened: list[str] = []
    runtime = ScriptedRuntime()
    execute = runtime.execute

    def noting(plan: Any) -> Any:
        happened.append("step")
        return execute(plan)

    def arrange(decision: Decision) -> None:
        happened.append(f"arrange {decision.mode}")

    runtime.execute = noting  # type: ignore[method-assign]
    await answer_two_tokens(Scheduler(Predictor(), "serve_only"), NoTraining(), runtime, arrange=arrange)
    first = happened.index("step")
    assert happened[first - 1 : first + 3] == ["arrange pause", "step", "arrange pause", "step"]


async def test_a_lane_drains_on_its_own_thread_and_only_with_a_device() -> None:
    where: list[str] = []

    def finish() -> None:
        import threading

        where.append(threading.current_thread().name)

    lane, plain = Lane("gpu", finish=finish), Lane("cpu")
    await lane.drain()
    await plain.drain()
    lane.close()
    plain.close()
    assert [name.partition("_")[0] for name in where] == ["gpu"]


async def test_what_is_learned_is_learned_for_the_split_it_ran_on() -> None:
    seen: list[Split | None] = []

    class Noting(Predictor):
        def observe(self, *args: Any, split: Split | None = None, **named: Any) -> None:
            seen.append(split)

    class OnSplit(Scheduler):
        def decide(self, *args: Any) -> Decision:
            return Decision("partition", "always", units=0, split=half)

    half = Split("64+68", 64 / 132, 68 / 132)
    trainer = NoTraining()
    await answer_two_tokens(OnSplit(Noting(), "serve_only"), trainer, ScriptedRuntime())
    assert seen[0] == half
    assert half in trainer.places


@pytest.mark.parametrize(
    "decision",
    [
        Decision("partition", "always", units=0, split=Split("64+68", 0.5, 0.5), after=2),  # type: ignore[arg-type]
        Decision("fused", "always", units=1, fused_tokens=64, after=2),  # type: ignore[arg-type]
    ],
    ids=["beside training", "fused"],
)
async def test_a_slice_follows_the_step_on_the_whole_device(decision: Decision) -> None:
    happened: list[str] = []

    class Always(Scheduler):
        def decide(self, step: Any, *args: Any) -> Decision:
            return decision if step is not None else super().decide(step, *args)

    class Noting(NoTraining):
        def launch(self, units: int, lane: Any = None, *args: Any, **named: Any) -> Any:
            happened.append(f"{units} on {lane.name if lane else None}")
            return super().launch(units)

    runtime = ScriptedRuntime()
    execute = runtime.execute
    runtime.execute = lambda plan: happened.append("step") or execute(plan)  # type: ignore[method-assign, func-returns-value]

    def arrange(decision: Decision) -> None:
        happened.append(f"{decision.mode}, split: {decision.split and decision.split.name}")

    await answer_two_tokens(Always(Predictor(), "serve_only"), Noting(), runtime, arrange=arrange)
    first = happened.index("step")
    assert happened[first + 1 : first + 3] == ["time_slice, split: None", "2 on inference"]


async def test_a_step_begins_again_when_a_micro_batch_is_dropped_that_has_added_gradients() -> None:
    device, queue, leases = Device(), Queue(), []
    happened: list[str] = []
    shown: list[int] = []

    class Adding(Batch):
        has_added = True

        def __init__(self, unlucky: bool) -> None:
            super().__init__(device)
            self._unlucky = unlucky

        def next_unit(self, window: int, layers: int) -> WorkUnit | None:
            return WorkUnit("backward", self._unit, credit=2.0) if self.left else None

        def _unit(self) -> None:
            super()._unit()
            if self._unlucky:
                leases[-1].revoke()

    def begin(index: int, slots: Tensor) -> Adding:
        happened.append(f"begin {index}")
        shown.append(trainer.state().tokens)
        return Adding(unlucky=index == 1 and "drop 1" not in happened)

    def drop(index: int, batch: Batch) -> int:
        happened.append(f"drop {index}")
        shown.append(trainer.state().tokens)
        return 0

    run = fake_run(device)
    run.micro_batches, run.ends_step = lambda: 2, lambda index: index == 1
    run.begin, run.drop, run.state.bytes = begin, drop, 1
    run.finish = lambda index, batch: happened.append(f"finish {index}")
    pool = SlotPool(Slots(), watermark=0.0)
    grant = pool.grant
    pool.grant = lambda *args, **named: leases.append(grant(*args, **named)) or leases[-1]  # type: ignore[method-assign, func-returns-value]
    lane = DeviceLane("training", device, ahead=0)
    trainer = trainer_of(queue, pool, run, lane)
    await train(trainer, queue, lane=lane)
    assert happened == [
        "begin 0", "finish 0", "begin 1", "drop 1", "begin 0", "finish 0", "begin 1", "finish 1",
    ]  # fmt: skip
    assert trainer.state().tokens == 2 * 3 * 2, "what was done twice counts once"
    assert shown == [0, 6, 8, 8, 8], "a counter that people watch never falls"


async def test_a_trainer_that_has_ended_leaves_nobody_waiting() -> None:
    device, queue = Device(), Queue()
    lane = DeviceLane("training", device, ahead=0)
    trainer = trainer_of(queue, SlotPool(Slots(), watermark=0.0), fake_run(device), lane)
    task = asyncio.create_task(trainer.run())
    while not trainer.units.outlook().ready:  # noqa: ASYNC110  the trainer tells nobody
        await asyncio.sleep(0)
    allowed = trainer.units.launch(1, lane=lane)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.wait_for(allowed, 5)
    assert not trainer.units.outlook().ready


async def test_nobody_waits_for_units_while_another_job_starts() -> None:
    device, queue = Device(), Queue()
    lane, starting, go_on = DeviceLane("training", device, ahead=0), asyncio.Event(), asyncio.Event()

    async def file_path(file_id: str) -> None:
        if file_id == "large":
            starting.set()
            await go_on.wait()

    def begin(index: int, slots: Tensor) -> Batch:
        if index == 0:
            other = SimpleNamespace(id="other", training_file="large", validation_file=None, priority=1)
            queue.jobs.append(other)
        return Batch(device)

    first, second = fake_run(device), fake_run(device)
    first.begin, first.micro_batches, first.ends_step = begin, lambda: 2, lambda index: index == 1
    runs = iter([first, second])
    queue.file_path = file_path  # type: ignore[method-assign]
    trainer = trainer_of(queue, SlotPool(Slots(), watermark=0.0), lambda: next(runs), lane)
    trainer._max_running = 2
    task = asyncio.create_task(train(trainer, queue, lane=lane))
    await asyncio.wait_for(starting.wait(), 10)
    assert not trainer.units.outlook().ready
    go_on.set()
    await task


async def test_a_priority_that_is_changed_while_a_job_starts_is_not_lost() -> None:
    device, queue = Device(), Queue()
    lane = DeviceLane("training", device, ahead=0)
    weights: list[float] = []

    class Noting(FirstCome):
        def join(self, name: str, weight: float) -> None:
            super().join(name, weight)
            weights.append(weight)

        def reweigh(self, name: str, weight: float) -> None:
            super().reweigh(name, weight)
            weights.append(weight)

    async def begun(*_: object) -> Any:
        return changed

    def run() -> Any:
        trainer.heard(changed)
        return fake_run(device)

    changed: Any = SimpleNamespace(id="job", priority=100)
    queue.begun = begun  # type: ignore[method-assign]
    trainer = trainer_of(queue, SlotPool(Slots(), watermark=0.0), run, lane, order=Noting())
    await train(trainer, queue, lane=lane)
    assert weights == [1, 100]
