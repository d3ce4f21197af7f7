"""A comparison of policies, measured: what serving and training do alone, then run after run.

Knows the order of the measurements. How one is taken is in `session`, what they amount to in `comparison`; who
starts the system is in `compare`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from harli_appliance.bench.compare_ladder import Promise, capacity, climb
from harli_appliance.bench.compare_plan import ComparePlan, Run, stretch
from harli_appliance.bench.compare_store import Basis, CompareStore, Moment, Request, RunFile, Rung
from harli_appliance.bench.comparison import DISTURBED, TRIES, RunResult, SloTarget
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.replay import Record, Slo, percentiles
from harli_appliance.bench.session import FREE_SLO_MS, Replayed, Session, Tell, p99_tpot_ms
from harli_appliance.bench.system import System
from harli_appliance.bench.traces import Trace
from harli_appliance.bench.verdict import ATTAINMENT_GOAL, REFERENCE
from harli_appliance.bench.workload import PlannedRequest
from harli_appliance.errors import UsageError
from harli_appliance.schema import Sample

FIRST_RUNG: Final = 2.0
"""The first rate that is tried, in answers per second of serving one by one: a batch serves more than that."""
LOWERED: Final = 0.9
"""Factor on a capacity that turns out to be too high."""
MOST_LOWERED: Final = 10
WARM_UP: Final = "naive"
"""Runs beside every step, so that the predictor learns what co-running costs before any policy asks."""
WARM_UP_S: Final = 20.0
ALONE_TRIES: Final = 3
"""All promises hang on it."""
SLOWEST: Final = 2.0
"""The clock goes so many times slower or faster at most: beyond that something else is wrong."""


class CompareRun:
    """All runs of a plan on one ready system.

    Args:
        model: the name to ask for.
        prompts: made for that model.
        store: gets every run as soon as it is done; runs that it has already are not made again.
    """

    def __init__(
        self,
        system: System,
        model: str,
        plan: ComparePlan,
        trace: Trace,
        prompts: Prompts,
        store: CompareStore,
        tell: Tell,
    ) -> None:
        self._session = Session(
            system,
            model,
            prompts,
            sequence_tokens=plan.sequence_tokens,
            ttft_ms=plan.ttft_ms,
            seed=plan.seed,
        )
        self._plan = plan
        self._trace = trace
        self._store = store
        self._tell = tell
        self._probe_ms = 0.0
        self._last_pace: float | None = None
        """At the end of the run before; None when there was none."""

    async def measure(self) -> None:
        """
        Raises:
            UsageError: serving alone cannot keep any promise on this machine; said before the first run. One that
                it cannot keep is left out where there are others.
            HarliError: whatever the system refuses.
        """
        await self._session.open()
        basis = self._store.basis()
        if basis is None:
            basis = await self._measure_basis()
            self._store.keep_basis(basis)
        else:
            self._probe_ms = basis.probe_ms
            await self._session.use("train_only")
            await self._session.training.start()
        targets = {target.label: target for target in basis.targets}
        await self._warm_up(max(target.capacity_per_s for target in basis.targets))
        runs = list(self._plan.runs(basis.kept))
        for number, run in enumerate(runs):
            if not self._store.has(run):
                self._tell("Runs", number / len(runs), run.title)
                self._store.keep(run, await self._undisturbed(run, targets[run.slo]))
        self._tell("Runs", 1.0, f"{len(runs)} done")

    # -- what everything is relative to ------------------------------------------------------------------

    async def _measure_basis(self) -> Basis:
        plan = self._plan
        await self._session.use(REFERENCE)
        self._probe_ms = await self._session.light_tpot_ms()
        light, pace = await self._serve_alone()
        alone_ms = p99_tpot_ms(light) / pace
        promises = self._promises(alone_ms)
        first = FIRST_RUNG * len(light) / sum(record.ended_at - record.sent_at for record in light)
        rungs = await climb(promises, first, plan.most_rungs, lambda rate: self._rung(rate, promises))
        targets: list[SloTarget] = []
        for promise in promises:
            found = capacity(promise, rungs)
            if found is not None:
                found = await self._check_capacity(promise, found)
            if found is None:
                self._leave_out(
                    f"serving alone cannot keep {promise.label} ({promise.tpot_ms:.0f} ms per token, first token "
                    f"within {plan.ttft_ms:.0f} ms) on this machine at {rungs[0].rate_per_s:.2f} requests/s or "
                    "more; ask for a looser one with --slo-tpot or --slo-ttft",
                    last=not targets and promise is promises[-1],
                )
                continue
            targets.append(SloTarget(promise.label, promise.tpot_ms, plan.ttft_ms, found))
        return Basis(alone_ms, await self._train_alone(), tuple(targets), tuple(rungs), self._probe_ms)

    async def _serve_alone(self) -> tuple[list[Record], float]:
        """Requests one by one, and how many times slower the machine was meanwhile than when its pace was first
        measured; of `ALONE_TRIES` the time in which that changed least."""
        tries: list[tuple[float, list[Record], float]] = []
        before = 1.0
        while len(tries) < ALONE_TRIES:
            records = await self._session.one_by_one(self._trace, self._plan.light_requests, self._tell)
            after = await self._measure_pace()
            tries.append((_change(after / before), records, (before + after) / 2))
            if tries[-1][0] <= DISTURBED:
                break
            before = after
        _, records, pace = min(tries, key=lambda found: found[0])
        return records, pace

    def _promises(self, alone_ms: float) -> list[Promise]:
        promises: list[Promise] = []
        for slo in self._plan.slos:
            promise = Promise(slo.label, slo.resolve(alone_ms))
            if promise.tpot_ms >= alone_ms:
                promises.append(promise)
                continue
            self._leave_out(
                f"serving alone cannot keep {promise.label} on this machine: one request at a time takes "
                f"{alone_ms:.1f} ms per token (p99); ask for more with --slo-tpot",
                last=not promises and slo is self._plan.slos[-1],
            )
        return promises

    def _leave_out(self, why: str, *, last: bool) -> None:
        """Go on without a promise, if another is left."""
        if last:
            raise UsageError(why, param="slo_tpot")
        self._tell("Left out", 1.0, why)

    async def _rung(self, rate: float, promises: Sequence[Promise]) -> Rung:
        plan = self._plan
        self._tell("Capacity of serving alone", None, f"{rate:.2f} requests/s")
        seconds = min(max(plan.ladder_requests / rate, plan.shortest_rung_s), plan.longest_rung_s)
        length = min(plan.lead_s + seconds, self._trace.duration_s)
        part, loosest = stretch(self._trace, plan, rate, 0, length), max(p.tpot_ms for p in promises)
        seen = await self._replay(part, REFERENCE, grace_s=plan.grace_of(loosest))
        records = [record for request, record in seen.answers if request.at_s >= plan.lead_s]
        answered = [record for record in records if record.error is None]
        return Rung(
            rate,
            len(records),
            percentiles([1e3 * r.tpot_s for r in answered if r.tpot_s is not None])["p99"],
            percentiles([1e3 * r.ttft_s for r in answered if r.ttft_s is not None])["p99"],
            {
                p.label: sum(r.meets(Slo(p.tpot_ms, plan.ttft_ms)) for r in records) / max(1, len(records))
                for p in promises
            },
        )

    async def _check_capacity(self, promise: Promise, rate: float) -> float | None:
        """`rate`, lowered until serving alone keeps the promise at the highest load in every part of the trace: a
        rung is shorter than a run, and one part may be calmer than another. Of two tries the better one counts, as
        on the rungs. None when it keeps none that is anywhere near."""
        repetition = lowered = 0
        while lowered <= MOST_LOWERED:
            if await self._keeps(promise, rate, repetition) or await self._keeps(promise, rate, repetition):
                repetition += 1
                if repetition == self._plan.repetitions:
                    return rate
            else:
                rate, lowered = rate * LOWERED, lowered + 1
        return None

    async def _keeps(self, promise: Promise, capacity_per_s: float, repetition: int) -> bool:
        plan = self._plan
        rate = capacity_per_s * plan.loads[-1] / 100
        self._tell("Capacity in every part of the trace", None, f"{promise.label}, {rate:.2f} requests/s")
        part = stretch(self._trace, plan, rate, repetition)
        seen = await self._replay(part, REFERENCE, grace_s=plan.grace_of(promise.tpot_ms))
        slo = Slo(promise.tpot_ms, plan.ttft_ms)
        records = [record for request, record in seen.answers if request.at_s >= plan.lead_s]
        return sum(record.meets(slo) for record in records) >= ATTAINMENT_GOAL * len(records)

    async def _train_alone(self) -> float:
        """Tokens per second of training with nobody to serve."""
        self._tell("Training alone", None, "")
        pace = await self._measure_pace()
        await self._session.use("train_only")
        await self._session.training.start()
        before, began = await self._session.trained_tokens(), time.perf_counter()
        await asyncio.sleep(self._plan.train_alone_s)
        return pace * (await self._session.trained_tokens() - before) / (time.perf_counter() - began)

    async def _warm_up(self, capacity_per_s: float) -> None:
        self._tell("Warming up", None, "serving and training together")
        plan = self._plan
        middle = plan.loads[len(plan.loads) // 2] / 100
        length = min(plan.length_s, plan.lead_s + WARM_UP_S)
        part = stretch(self._trace, plan, capacity_per_s * middle, 0, length)
        await self._replay(part, WARM_UP, grace_s=plan.grace_s)

    # -- one run -----------------------------------------------------------------------------------------

    async def _undisturbed(self, run: Run, target: SloTarget) -> RunFile:
        """A run during which the machine stayed as fast as it was, or of `TRIES` the one that came closest."""
        best: RunFile | None = None
        for _ in range(TRIES):
            before = await self._pace()
            pace = _clock(before)
            found = await self._run(run, target, pace)
            after = self._last_pace = await self._measure_pace()
            change = round(max(_change(before / pace), _change(after / pace)), 3)
            if best is None or change < (best.result.change or math.inf):
                best = replace(found, result=replace(found.result, pace=round(pace, 3), change=change))
            if change <= DISTURBED:
                break
        assert best is not None  # noqa: S101
        return best

    async def _pace(self) -> float:
        """How many times slower the machine is now than when the promise was made, unless that is known."""
        pace, self._last_pace = self._last_pace, None
        return pace or await self._measure_pace()

    async def _measure_pace(self) -> float:
        return await self._session.light_tpot_ms() / self._probe_ms

    async def _run(self, run: Run, target: SloTarget, pace: float) -> RunFile:
        await self._session.training.keep_up()
        rate = target.capacity_per_s * run.load / 100
        part = stretch(self._trace, self._plan, rate, run.repetition)
        seen = await self._replay(
            part, run.policy, target.tpot_ms, grace_s=self._plan.grace_of(target.tpot_ms), pace=pace
        )
        slo = Slo(target.tpot_ms, target.ttft_ms)
        requests = [
            _request(record, request, slo, counts=request.at_s >= self._plan.lead_s)
            for request, record in seen.answers
        ]
        moments = [_moment(sample, seen.start) for sample in seen.samples]
        return RunFile(self._result(run, requests, moments, seen.trained_tokens_per_s), requests, moments)

    async def _replay(
        self,
        part: Trace,
        policy: str,
        tpot_ms: float = FREE_SLO_MS,
        *,
        grace_s: float,
        pace: float | None = None,
    ) -> Replayed:
        pace = pace or _clock(await self._measure_pace())
        return await self._session.replay(
            part, policy, tpot_ms, lead_s=self._plan.lead_s, grace_s=grace_s, pace=pace
        )

    def _result(
        self, run: Run, requests: Sequence[Request], moments: Sequence[Moment], trained_per_s: float
    ) -> RunResult:
        counted = [request for request in requests if request.counts]
        inside = [m.mode for m in moments if self._plan.lead_s <= m.at_s <= self._plan.length_s]
        return RunResult(
            policy=run.policy,
            slo=run.slo,
            load=run.load,
            repetition=run.repetition,
            requests=len(counted),
            good=sum(request.met for request in counted),
            failed=sum(request.error is not None for request in counted),
            finetune_tokens_per_s=trained_per_s,
            tpot_ms=tuple(round(r.tpot_ms, 3) for r in counted if r.tpot_ms is not None),
            ttft_ms=tuple(round(r.ttft_ms, 3) for r in counted if r.ttft_ms is not None),
            modes={mode: inside.count(mode) / len(inside) for mode in sorted(set(inside))},
        )


def _clock(pace: float) -> float:
    """How many times slower the clock of a run goes."""
    return min(SLOWEST, max(1.0 / SLOWEST, pace))


def _change(ratio: float) -> float:
    """How many times faster or slower, whichever it was."""
    return max(ratio, 1.0 / ratio)


def _request(record: Record, request: PlannedRequest, slo: Slo, *, counts: bool) -> Request:
    answered = record.error is None
    return Request(
        at_s=round(request.at_s, 4),
        prompt_tokens=record.prompt_tokens,
        tokens=record.tokens,
        ttft_ms=1e3 * record.ttft_s if record.ttft_s is not None and answered else None,
        tpot_ms=1e3 * record.tpot_s if record.tpot_s is not None and answered else None,
        took_s=round(record.ended_at - record.sent_at, 4),
        met=record.meets(slo),
        counts=counts,
        error=record.error,
    )


def _moment(sample: Sample, start: float) -> Moment:
    return Moment(
        at_s=round(sample.t - start, 3),
        mode=sample.mode,
        running=sample.running,
        step_ms=sample.step_ms,
        output_tokens=sample.output_tokens,
        training_tokens=sample.training_tokens,
        leased=sample.pool.leased,
        slots=sample.pool.slots,
    )
