"""``harli plan``: every policy under every promise at every load, simulated, as the same report that
measurements give.

A load is a share of what serving alone can take under the promise. A relative promise is a multiple of the time
per output token of requests that are served one by one (p99). Knows no costs and no policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harli_appliance.bench.compare_plan import SloAsked
from harli_appliance.bench.comparison import RunResult, SloTarget, build_report
from harli_appliance.bench.traces import Trace
from harli_appliance.bench.traces_read import load_trace
from harli_appliance.bench.traces_synthetic import synthetic_trace
from harli_appliance.bench.verdict import ATTAINMENT_GOAL, OURS
from harli_appliance.errors import UsageError
from harli_appliance.planner.device import decode_work
from harli_appliance.planner.limit import physical_limit
from harli_appliance.planner.roofline import Roofline
from harli_appliance.planner.scenario import SERVE_ONLY, Fleet, Scenario, run
from harli_appliance.scheduling.policies import make_policy

SEED = 7
"""Of the synthetic trace."""
FAR_S = 3600.0
"""Apart, so that none sees another."""
ONE_BY_ONE = 50
"""Requests that a relative promise is measured over."""
DOUBLINGS = 8
"""From the lowest rate to the highest in the search for what serving alone can take."""
HALVINGS = 4
"""Of the last doubling."""

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of it that is done."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan is asked for.

    Attributes:
        trace: its own rate does not matter, its bursts and lengths do.
        policies: ``static`` stands for all splits of the device.
        lead_s: of the trace, in which nothing counts.
        loads: percent of what serving alone can take.
        repetitions: of every run, with other arrivals.
        workers: processes to simulate in.
    """

    fleet: Fleet
    trace: Trace
    promises: Sequence[SloAsked]
    ttft_ms: float
    policies: Sequence[str]
    loads: Sequence[int]
    lead_s: float = 0.0
    repetitions: int = 1
    workers: int = 1


def simulate(question: Question, command: str, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Simulate it all; the content of ``report.json``, marked as simulated.

    Raises:
        UsageError: a policy is not known, the model does not fit, or serving alone cannot keep a promise.
    """
    fleet = question.fleet
    policies = _policies(question.policies, fleet)
    _check_room(question)
    alone = _Alone(question, progress)
    targets = [alone.target(promise) for promise in question.promises]
    scenarios = [
        Scenario(fleet, policy, _trace(question, target, load, repetition), target.label, target.tpot_ms,
                 question.ttft_ms, load, repetition, question.lead_s)
        for target in targets
        for load in question.loads
        for repetition in range(question.repetitions)
        for policy in policies
    ]  # fmt: skip
    results: list[RunResult] = []
    for result in _simulate(scenarios, question.workers):
        results.append(result)
        progress(f"{result.policy} at {result.load}% under {result.slo}", len(results) / len(scenarios))
    context: dict[str, Any] = {"replicas": fleet.replicas, "decode_only": fleet.decode_only}
    if isinstance(fleet.device, Roofline):
        context |= {"model": fleet.device.model.name, "physical_limit": _limits(scenarios, results)}
    return build_report(
        results,
        targets,
        trace=describe_trace(question.trace),
        machine=fleet.device.describe(),
        simulated=True,
        command=command,
        context=context,
    )


def read_trace(path: Path | None, start_s: float, duration_s: float, *, skip_bad: bool) -> Trace:
    """A window of a trace file; without one, of a synthetic bursty trace.

    Raises:
        UsageError: as `load_trace` and `Trace.window` do.
    """
    if path is None:
        return synthetic_trace(start_s + duration_s, SEED).window(start_s, duration_s)
    return load_trace(path, skip_bad=skip_bad).window(start_s, duration_s)


def describe_trace(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "requests": len(trace),
        "duration_s": round(trace.duration_s, 3),
        "mean_prompt_tokens": round(trace.mean_prompt_tokens, 1),
        "mean_output_tokens": round(trace.mean_output_tokens, 1),
        "skipped": trace.skipped,
    }


def _policies(wanted: Iterable[str], fleet: Fleet) -> list[str]:
    """Each known to the device, ``static`` as all of its splits."""
    splits = fleet.device.splits
    names: list[str] = []
    for name in wanted:
        several = name == "static" and splits
        names += [f"static:{split.name}" for split in splits] if several else [name]
    for name in names:
        make_policy(name, splits)
    return list(dict.fromkeys(names))


def _check_room(question: Question) -> None:
    device = question.fleet.device
    longest = max(request.prompt_tokens + request.output_tokens for request in question.trace.requests)
    if device.slots < longest:
        raise UsageError(
            f"the model leaves room for {max(0, device.slots):,} tokens of KV cache, and a request of the "
            f"trace needs {longest:,}; choose a device with more memory, a smaller model or a shorter trace",
            param="gpu",
        )


def _trace(question: Question, target: SloTarget, load: int, repetition: int) -> Trace:
    return question.trace.at_rate(target.capacity_per_s * load / 100, seed=repetition)


def _simulate(scenarios: Sequence[Scenario], workers: int) -> Iterator[RunResult]:
    if workers == 1:
        yield from map(run, scenarios)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(run, scenarios)


def _limits(scenarios: Sequence[Scenario], results: Sequence[RunResult]) -> dict[str, Any]:
    """For each SLO and load the bound in tokens/s (all appliances together), and the share of it that ours
    reaches."""
    limits: dict[str, Any] = {}
    for scenario, result in zip(scenarios, results, strict=True):
        fleet, device = scenario.fleet, scenario.fleet.device
        cells = limits.setdefault(scenario.slo, {})
        if (str(scenario.load) in cells and scenario.policy != OURS) or not isinstance(device, Roofline):
            continue
        bound = physical_limit(device, _counted(scenario), scenario.tpot_ms, appliances=fleet.replicas,
                               decode_only=fleet.decode_only)  # fmt: skip
        cell = cells.setdefault(str(scenario.load), {**asdict(bound), "reached": None})
        if scenario.policy == OURS and bound.tokens_per_s > 0:
            cell["reached"] = result.finetune_tokens_per_s / bound.tokens_per_s
    return limits


def _counted(scenario: Scenario) -> Trace:
    """What arrives after the lead."""
    return scenario.trace.window(scenario.lead_s, scenario.trace.duration_s - scenario.lead_s)


class _Alone:
    """Serving without training: how fast it is when hardly anybody asks, and how many requests it can take."""

    def __init__(self, question: Question, progress: Progress) -> None:
        self._question = question
        self._progress = progress
        self._runs: dict[float, RunResult] = {}
        device, trace = question.fleet.device, question.trace
        many = question.fleet.limits.running
        full = device.solo_ms(decode_work(many, many * round(trace.mean_prompt_tokens)))
        self._most = question.fleet.replicas * many * 1e3 / (trace.mean_output_tokens * full)
        self._reference_ms: float | None = None

    def target(self, promise: SloAsked) -> SloTarget:
        tpot_ms = promise.resolve(math.nan if promise.factor is None else self._reference())
        rate = self._most / 2.0**DOUBLINGS
        if not self._keeps(rate, tpot_ms):
            rate = 0.0
        while 0.0 < rate < self._most and self._keeps(2 * rate, tpot_ms):
            rate *= 2
        step = rate / 2
        for _ in range(HALVINGS):
            if rate > 0.0 and self._keeps(rate + step, tpot_ms):
                rate += step
            step /= 2
        if rate == 0.0:
            alone_ms = self._reference()
            what = (
                f"it takes {alone_ms:.1f} ms a token (p99) for requests that are served one by one; promise more "
                "than that"
                if tpot_ms < alone_ms
                else f"requests that come together miss {tpot_ms:.1f} ms a token or their first one in "
                f"{self._question.ttft_ms:.0f} ms at any rate; promise more with --slo-tpot or --slo-ttft"
            )
            raise UsageError(f"serving alone cannot keep {promise.label}: {what}", param="slo_tpot")
        return SloTarget(promise.label, tpot_ms, self._question.ttft_ms, rate)

    def _reference(self) -> float:
        """p99 of the time per output token of requests that are served one by one, in milliseconds."""
        if self._reference_ms is None:
            fleet = replace(self._question.fleet, replicas=1)
            requests = self._question.trace.requests
            some = requests[:: max(1, len(requests) // ONE_BY_ONE)]
            apart = tuple(replace(one, at_s=index * FAR_S) for index, one in enumerate(some))
            found = self._run(Trace("one by one", apart, len(apart) * FAR_S), fleet)
            if not found.tpot_ms:
                raise UsageError("no answer of the trace has a second token, whose time could be promised")
            self._reference_ms = float(np.percentile(found.tpot_ms, 99))
        return self._reference_ms

    def _keeps(self, rate: float, tpot_ms: float) -> bool:
        if rate not in self._runs:
            self._progress(f"serving alone at {rate:.2f} requests/s", 0.0)
            self._runs[rate] = self._run(self._question.trace.at_rate(rate, seed=0), self._question.fleet)
        found = self._runs[rate]
        # The times of both kinds are of the same requests, but not in pairs: a request that misses both
        # counts twice.
        late = sum(value > tpot_ms for value in found.tpot_ms)
        late += sum(value > self._question.ttft_ms for value in found.ttft_ms)
        return late + found.failed <= (1.0 - ATTAINMENT_GOAL) * found.requests

    def _run(self, trace: Trace, fleet: Fleet) -> RunResult:
        scenario = Scenario(fleet, SERVE_ONLY, trace, "", math.inf, self._question.ttft_ms, 0, 0)
        return run(scenario)
