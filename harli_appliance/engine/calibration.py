"""Teaching the predictor before anything is promised: a short sweep of steps, alone and beside training.

Rounds of made-up requests, each round with more of them: their prompts are chunks to process, their answers decode
steps of that batch size. Every other step has training units beside it. Runs before the engine ticks and before
requests are taken, on the engine's own runtime and lanes, so that what is measured is what will run. Knows steps
and times; does not know policies or what a unit computes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harli_appliance.engine.lanes import Lane
from harli_appliance.engine.steps import step_of
from harli_appliance.runtime.protocol import Runtime, Sampling, StepPlan, Submission
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import UNLIMITED, Decision, Split, Step

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Requests of a round."""
ALWAYS = 16
"""Larger rounds are made up to half of the requests that can be decoded together."""
PROMPTS = (24, 96, 256, 160)
"""Tokens of their prompts, in turn."""
DECODES = 12
"""Decode steps of a round; half of them beside training."""
UNITS_ALONE = 20
"""Training units on the whole device, where it has splits: what the work beside serving is compared with."""
WARM_UP = 2
"""Decode steps before the first round; first steps are slower than any that follow."""


@dataclass(frozen=True, slots=True)
class Round:
    """Prompts of these lengths, answered together with `decodes` + 1 tokens each."""

    prompts: tuple[int, ...]
    decodes: int


@dataclass(frozen=True, slots=True)
class _Sample:
    step: Step
    took_ms: float
    corun: bool
    split: Split | None


def rounds(slots: int, context: int, most_running: int) -> list[Round]:
    """The sweep, as far as it fits.

    Args:
        slots: of the pool; a round takes half of them at most.
        context: longest prompt and answer, in tokens.
        most_running: requests that can be decoded together.
    """
    found = []
    longest = context - DECODES - 1
    most = max(min(ALWAYS, most_running), most_running // 2)
    for batch in BATCHES:
        lengths = tuple(min(PROMPTS[i % len(PROMPTS)], longest) for i in range(batch))
        if batch <= most and sum(lengths) + batch * (DECODES + 1) <= slots / 2:
            found.append(Round(lengths, DECODES))
    return found


class Calibration:
    """Runs the sweep; `run` once.

    Args:
        unit: one unit of training work, or None where nothing can be finetuned: then steps are only run alone.
        unit_tokens: whole tokens' work of a unit.
        vocabulary: prompts are made of tokens below this.
        splits: ways to divide the device at run time: the sweep is made on each of them, and alone on the whole.
        arrange: puts the lanes where a decision wants them, as for the engine.
        on_progress: called with the share that is done, in (0, 1].
    """

    def __init__(
        self,
        runtime: Runtime,
        predictor: Predictor,
        inference: Lane,
        training: Lane,
        unit: Callable[[], None] | None,
        *,
        vocabulary: int,
        unit_tokens: float = 0.0,
        splits: Sequence[Split] = (),
        arrange: Callable[[Decision], None] = lambda _: None,
        on_progress: Callable[[float], None],
    ) -> None:
        self._runtime = runtime
        self._predictor = predictor
        self._inference = inference
        self._training = training
        self._unit = unit
        self._unit_tokens = unit_tokens
        self._vocabulary = vocabulary
        self._splits = splits
        self._arrange = arrange
        self._on_progress = on_progress
        self._rng = random.Random(0)
        self._requests = 0

    async def run(self, sweep: Sequence[Round]) -> None:
        """Measure every round, then teach: steps alone first, because the slowdown is learned on top of them."""
        if self._unit is not None:
            await self._training.run(self._unit)
            if self._splits:
                await self._units_alone(self._unit)
        await self._measure(Round((PROMPTS[0],), WARM_UP), None, beside=False)
        places: list[Split | None] = [None, *self._splits]
        samples: list[_Sample] = []
        total = len(places) * sum(len(part.prompts) for part in sweep)
        done = 0
        for split in places:
            # Where the device can be divided, nothing runs beside a step that has the whole of it.
            beside = self._unit is not None and (split is not None or not self._splits)
            for part in sweep:
                samples += await self._measure(part, split, beside=beside)
                done += len(part.prompts)
                self._on_progress(done / total)
        for sample in sorted(samples, key=lambda sample: sample.corun):
            self._predictor.observe(sample.step, sample.took_ms, corun=sample.corun, split=sample.split)

    async def _measure(self, part: Round, split: Split | None, *, beside: bool) -> list[_Sample]:
        """Steps of a round; where asked for, every other one of a kind has units beside it."""
        if split is None:
            self._arrange(Decision("pause", "measuring", units=0))
        else:
            self._arrange(Decision("partition", "measuring", units=UNLIMITED, split=split))
        await self._inference.run(self._submit, part)
        samples: list[_Sample] = []
        following = dict.fromkeys(("prefill", "decode"), False)
        while (plan := await self._inference.run(self._runtime.plan)) is not None:
            corun = following[plan.kind]
            samples.append(_Sample(step_of(plan), await self._step(plan, corun, split), corun, split))
            following[plan.kind] = beside and not corun
        return samples

    def _submit(self, part: Round) -> None:
        for length in part.prompts:
            self._requests += 1
            prompt = [self._rng.randrange(self._vocabulary) for _ in range(length)]
            sampling = Sampling(max_tokens=part.decodes + 1, ignore_eos=True)
            self._runtime.submit(Submission(f"calibration-{self._requests}", prompt, sampling))

    async def _step(self, plan: StepPlan, corun: bool, split: Split | None) -> float:
        """Milliseconds that the step took."""
        stop = asyncio.Event()
        beside = asyncio.create_task(self._units(stop, split)) if corun else None
        await asyncio.sleep(0)  # let the first unit begin
        outcome = await self._inference.run(self._runtime.execute, plan)
        stop.set()
        if beside is not None:
            await beside
        return 1e3 * outcome.seconds

    async def _units(self, stop: asyncio.Event, split: Split | None) -> None:
        while self._unit is not None and not stop.is_set():
            await self._timed(self._unit, split)

    async def _units_alone(self, unit: Callable[[], None]) -> None:
        self._arrange(Decision("training", "measuring", units=UNLIMITED))
        for _ in range(UNITS_ALONE):
            await self._timed(unit, None)
        await self._training.drain()

    async def _timed(self, unit: Callable[[], None], split: Split | None) -> None:
        began = time.perf_counter()
        await self._training.run(unit)
        self._predictor.observe_training(self._unit_tokens, time.perf_counter() - began, split)
