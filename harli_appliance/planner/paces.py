"""How the pace of a measured machine changed: what lasts for seconds slows everything down and is its pace, what
differs from one step to the next is noise.

Knows measured steps and runs; does not know how they are used.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harli_appliance.bench.compare_store import RunFile
from harli_appliance.bench.predictor_errors import Observed
from harli_appliance.planner.measured_steps import MeasuredSteps
from harli_appliance.scheduling.types import Step

REACH_S = 2.0
"""Before and after a moment: the median over that time is the pace."""
SERVING = frozenset({"partition", "pause", "time_slice", "fused"})
ENOUGH_S = 3.0
"""Of one kind of training in a run, for its speed to be told from it."""
LASTING = 4
"""Moments in a row, a second, in which that was so."""


@dataclass(frozen=True, slots=True)
class Paces:
    """Attributes:
    ends_s: when each of the factors was over, ascending.
    factors: times the usual duration; about 1.
    """

    ends_s: Sequence[float] = ()
    factors: Sequence[float] = ()

    def at(self, at_s: float) -> float:
        """The factor at that time, from the beginning again when they are through; 1 where there are none."""
        if not self.factors:
            return 1.0
        return self.factors[bisect.bisect_right(self.ends_s, at_s % self.ends_s[-1])]


@dataclass(frozen=True, slots=True)
class TrainingRates:
    """Tokens per second with nobody to serve, and beside serving steps, at the usual pace."""

    alone: float
    beside: float


def paces_and_noise(found: Iterable[Observed], steps: MeasuredSteps) -> tuple[Paces, Sequence[float]]:
    """Of decode steps that followed each other; reading a prompt is off by more than the machine's pace."""
    decodes = [one for one in found if one.step.kind == "decode"]
    ratios = np.array([one.measured_ms / steps.expected_ms(one.step, corun=one.corun) for one in decodes])
    ends_s = np.array([*itertools.accumulate(one.measured_ms / 1e3 for one in decodes)])
    smooth = _running_median(ends_s, ratios)
    return Paces(ends_s.tolist(), smooth.tolist()), (ratios / smooth).tolist()


def paces_of(run: RunFile, steps: MeasuredSteps) -> Paces:
    """Of a run under any policy: its serving steps against what such steps usually take."""
    rows = np.mean([request.prompt_tokens + request.tokens / 2 for request in run.requests] or [0.0])
    ends_s, ratios = [], []
    for moment in run.moments:
        if moment.step_ms is not None and moment.running and moment.mode in SERVING:
            step = Step("decode", moment.running, round(moment.running * rows))
            usual_ms = steps.expected_ms(step, corun=moment.mode == "partition")
            ends_s.append(moment.at_s)
            ratios.append(moment.step_ms / usual_ms)
    if not ends_s or ends_s[-1] <= 0.0:
        return Paces()
    return Paces(ends_s, _running_median(np.array(ends_s), np.array(ratios)).tolist())


def rates_of(runs: Iterable[tuple[RunFile, Paces]]) -> TrainingRates | None:
    """How fast training went, at the usual pace: the median over the runs that did it for some time; None where
    none trained beside requests.."""
    alone: list[float] = []
    beside: list[float] = []
    for run, paces in runs:
        for mode, rates in (("training", alone), ("partition", beside)):
            rate = _rate(run, paces, mode)
            if rate is not None:
                rates.append(rate)
    if not alone or not beside:
        return None
    return TrainingRates(float(np.median(alone)), float(np.median(beside)))


def _rate(run: RunFile, paces: Paces, mode: str) -> float | None:
    """Tokens per second in `mode`, where it lasted: what is seen now and then may change from step to step."""
    tokens = seconds = 0.0
    for _, stretch in itertools.groupby(run.moments, lambda moment: moment.mode == mode):
        moments = [*stretch]
        if moments[0].mode == mode and len(moments) > LASTING:
            tokens += sum(moment.training_tokens * paces.at(moment.at_s) for moment in moments[1:])
            seconds += moments[-1].at_s - moments[0].at_s
    return tokens / seconds if seconds >= ENOUGH_S else None


def _running_median(at_s: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    first = np.searchsorted(at_s, at_s - REACH_S)
    after = np.searchsorted(at_s, at_s + REACH_S, side="right")
    return np.array([np.median(values[a:b]) for a, b in zip(first, after, strict=True)])
