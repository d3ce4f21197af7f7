"""One system under measurement: policies are switched, traces replayed, training followed, one after the other.

Knows the system, prompts and the clock. What is replayed when, and what it means, is for the benchmarks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.replay import Record, ask, percentiles, replay
from harli_appliance.bench.system import System
from harli_appliance.bench.traces import Trace
from harli_appliance.bench.training_load import TrainingLoad
from harli_appliance.bench.verdict import REFERENCE
from harli_appliance.bench.workload import PlannedRequest
from harli_appliance.errors import EngineFault
from harli_appliance.schema import PolicyChange, Sample

DRAIN_TIMEOUT_S: Final = 30.0
FREE_SLO_MS: Final = 1e6
"""Where nothing is promised."""
LIGHT_ANSWERS: Final = 3
LIGHT_TOKENS: Final = 16
_PROBE_WORDS: Final = 8

Tell = Callable[[str, float | None, str], None]
"""Called as things go on: a title, the share done, and a note."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one replay saw.

    Attributes:
        answers: each request with what became of it.
        start: seconds since the epoch.
        trained_tokens_per_s: between the lead and the end of the trace.
    """

    answers: Sequence[tuple[PlannedRequest, Record]]
    samples: Sequence[Sample]
    start: float
    trained_tokens_per_s: float


class Session:
    """Measures on `system`; begin with `open`.

    Args:
        model: the name to ask for.
        prompts: made for that model.
        sequence_tokens: of a micro-batch of the finetuning job.
        ttft_ms: promised in every replay.
        seed: of the requests that are asked one by one, and of the words of prompts.

    Attributes:
        training: the finetuning job; begins when its `start` is awaited.
    """

    def __init__(
        self,
        system: System,
        model: str,
        prompts: Prompts,
        *,
        sequence_tokens: int,
        ttft_ms: float,
        seed: int,
    ) -> None:
        self.training = TrainingLoad(system, model, prompts, sequence_tokens)
        self._system = system
        self._model = model
        self._prompts = prompts
        self._ttft_ms = ttft_ms
        self._seed = seed
        self._overhead = 0
        self._replays = 0
        self._lights = 0
        self._seen = 0

    async def open(self) -> None:
        """Ask once, to see what the chat template adds to a message.

        Raises:
            EngineFault: there was no answer.
        """
        probe = PlannedRequest(0, 0.0, self._prompts.words(_PROBE_WORDS, "probe"), 2)
        record = await ask(self._system, self._model, probe)
        if record.error is not None:
            raise EngineFault(f"the first request failed: {record.error}")
        self._overhead = record.prompt_tokens - _PROBE_WORDS

    async def use(self, policy: str, tpot_ms: float = FREE_SLO_MS, ttft_ms: float | None = None) -> None:
        """Follow a policy under a promise from now on."""
        change = PolicyChange(policy=policy, slo_tpot_ms=tpot_ms, slo_ttft_ms=ttft_ms or self._ttft_ms)
        await self._system.change_policy(change)

    async def trained_tokens(self) -> int:
        return (await self._system.status()).training.tokens

    async def one_by_one(self, trace: Trace, count: int, tell: Tell) -> list[Record]:
        """Requests of the trace's lengths, each sent when the one before is answered.

        Raises:
            EngineFault: one of them failed.
        """
        title = "Serving alone, one at a time"
        requests = self._prompts.plan(trace.with_count(count, self._seed), self._overhead, "one by one")
        records = []
        for done, request in enumerate(requests):
            tell(title, done / count, "")
            records.append(await ask(self._system, self._model, request))
        failed = next((record.error for record in records if record.error is not None), None)
        if failed is not None or not any(record.tpot_s for record in records):
            raise EngineFault(f"serving alone failed: {failed or 'all answers are of one token'}")
        tell(title, 1.0, f"TPOT p99 {p99_tpot_ms(records):.1f} ms")
        return records

    async def light_tpot_ms(self) -> float:
        """TPOT of the fastest of a few short answers, one after the other with nothing beside them: the same work
        every time, which tells how fast the machine is now, apart from what disturbs it for a second.

        Raises:
            EngineFault: one of them failed.
        """
        await self._drain()
        self._lights += 1
        found = []
        for number in range(LIGHT_ANSWERS):
            words = self._prompts.words(_PROBE_WORDS, f"{self._seed} light {self._lights} {number}")
            record = await ask(self._system, self._model, PlannedRequest(0, 0.0, words, LIGHT_TOKENS))
            if record.tpot_s is None:
                raise EngineFault(f"serving alone failed: {record.error or 'an answer of one token'}")
            found.append(1e3 * record.tpot_s)
        return min(found)

    async def replay(
        self,
        trace: Trace,
        policy: str,
        tpot_ms: float = FREE_SLO_MS,
        *,
        lead_s: float,
        grace_s: float,
        pace: float = 1.0,
    ) -> Replayed:
        """Replay a trace under a policy, from an idle system.

        Args:
            lead_s: training counts from then on.
            grace_s: after the end of the trace; what is not answered then has failed.
            pace: how many times slower the machine is than the times given here are meant for. Requests come as
                much slower, and as much more is promised; all times found are given as if it were not.
        """
        await self._drain()
        await self.use(policy, min(FREE_SLO_MS, pace * tpot_ms), pace * self._ttft_ms)
        self._replays += 1
        planned = self._prompts.plan(trace, self._overhead, f"{self._seed} replay {self._replays}")
        requests = [replace(request, at_s=pace * request.at_s) for request in planned]
        self._seen = (await self._system.timeline(self._seen)).next
        start, wall = time.perf_counter(), time.time()
        answered_by_s = pace * (trace.duration_s + grace_s)
        replaying = asyncio.create_task(
            replay(self._system, self._model, requests, answered_by_s=answered_by_s)
        )
        try:
            await asyncio.sleep(pace * lead_s - (time.perf_counter() - start))
            before, began = await self.trained_tokens(), time.perf_counter()
            await asyncio.sleep(pace * trace.duration_s - (time.perf_counter() - start))
            trained = (await self.trained_tokens() - before) / (time.perf_counter() - began)
            records = await replaying
        finally:
            replaying.cancel()
        samples = (await self._system.timeline(self._seen)).samples
        return Replayed(
            [(request, _at_pace(record, pace)) for request, record in zip(planned, records, strict=True)],
            [_moved(sample, wall, pace) for sample in samples],
            wall,
            pace * trained,
        )

    async def _drain(self) -> None:
        """Until nothing of the replay before is left; serving comes first while it is."""
        await self.use(REFERENCE)
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while (serving := (await self._system.status()).serving).running or serving.waiting:
            if time.monotonic() > deadline:
                left = serving.running + serving.waiting
                raise EngineFault(f"{left} requests are still there after {DRAIN_TIMEOUT_S:g} s; see the log")
            await asyncio.sleep(0.05)


def _at_pace(record: Record, pace: float) -> Record:
    return replace(
        record,
        ended_at=record.sent_at + (record.ended_at - record.sent_at) / pace,
        ttft_s=record.ttft_s / pace if record.ttft_s is not None else None,
        tpot_s=record.tpot_s / pace if record.tpot_s is not None else None,
        itl_s=tuple(gap / pace for gap in record.itl_s),
    )


def _moved(sample: Sample, start: float, pace: float) -> Sample:
    step_ms = sample.step_ms / pace if sample.step_ms is not None else None
    return sample.model_copy(update={"t": start + (sample.t - start) / pace, "step_ms": step_ms})


def p99_tpot_ms(records: Sequence[Record]) -> float:
    """Of the answered ones; 0 without any."""
    return percentiles([1e3 * r.tpot_s for r in records if r.tpot_s is not None])["p99"] or 0.0
