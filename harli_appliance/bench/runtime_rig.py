"""SGLang and the engine on one lane, for measuring: as the appliance puts them together, without HTTP or jobs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from harli_appliance.device.partition import cpu_partition
from harli_appliance.engine.engine import Engine
from harli_appliance.engine.lanes import Lane
from harli_appliance.memory.pool import SlotPool
from harli_appliance.runtime.arguments import RuntimeOptions
from harli_appliance.runtime.kv import SglangSlots
from harli_appliance.runtime.protocol import Sampling, Submission
from harli_appliance.runtime.sglang_runtime import SglangRuntime
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.training.trainer import Trainer, TrainerState
from harli_appliance.training.unit_runner import UnitRunner


@dataclass(frozen=True, slots=True)
class Bench:
    """A runtime, and the lane on which alone it may be touched."""

    runtime: SglangRuntime
    lane: Lane
    folder: Path

    @classmethod
    def start(cls, folder: Path, *, pool_slots: int, max_rank: int = 16) -> Bench:
        lane = Lane("inference", cpu_partition().inference)
        options = RuntimeOptions(
            folder, pool_slots=pool_slots, max_running_requests=40, max_lora_rank=max_rank, lora=True
        )
        return cls(lane.submit(SglangRuntime, options).result(), lane, folder)

    def on_lane(self, work: Callable[[], Any]) -> Any:
        return self.lane.submit(work).result()

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """An engine that ticks, training off."""
        slots = await self.lane.run(SglangSlots, self.runtime)
        pool = SlotPool(slots, watermark=0.1, keep_cached=0.0)
        training = Lane("training", cpu_partition().training)
        engine = Engine(
            self.runtime,
            pool,
            Scheduler(Predictor(), "serve_only"),
            cast(Trainer, _NoTraining(training)),
            SloTracker(1e6, 1e6),
            self.lane,
            training,
            max_queued=256,
        )
        ticking = asyncio.create_task(engine.run())
        try:
            yield engine
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            await asyncio.to_thread(training.close)


class _NoTraining:
    """What the engine asks of a trainer, with nothing to train."""

    def __init__(self, lane: Lane) -> None:
        self.units = UnitRunner(lane, on_change=lambda: None)

    def state(self) -> TrainerState:
        return TrainerState(tokens=0, running=(), dropped_micro_batches=0)


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids that every model has and no tokenizer treats as special."""
    draw = random.Random(seed)
    return [draw.randrange(20, 300) for _ in range(tokens)]


def request(name: str, tokens: list[int], answer: int) -> Submission:
    return Submission(name, tokens, Sampling(max_tokens=answer, ignore_eos=True))


async def time_to_first(engine: Engine, submission: Submission) -> float:
    """Seconds from submitting to the first token; the request is run to its end."""
    began = time.perf_counter()
    first: float | None = None
    async for _ in engine.submit(submission):
        first = first if first is not None else time.perf_counter() - began
    if first is None:
        raise AssertionError("the answer is empty")
    return first


async def consume(engine: Engine, submission: Submission) -> None:
    async for _ in engine.submit(submission):
        pass
