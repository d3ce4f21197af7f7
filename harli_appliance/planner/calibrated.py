"""A device whose costs were measured: steps that a real appliance made, and how fast it trained.

Steps alone and beside training take what the predictor's model says, fitted to all measured ones at once. How
much slower or faster they were from moment to moment, on a machine that is shared, is replayed as it was. The
device is divided in one way, as a CPU is between its lanes, so a fused step is the training window's forward
pass and then the step, on the same lane.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harli_appliance.errors import UsageError
from harli_appliance.planner.device import StepWork
from harli_appliance.planner.shapes import ModelShape
from harli_appliance.planner.training import FORWARD_SHARE
from harli_appliance.scheduling.predictor import features_of, size_of
from harli_appliance.scheduling.regime import Regime
from harli_appliance.scheduling.types import Split, Step

QUANTILE = 0.99
"""Of the regimes' bounds, which nobody asks for here."""


@dataclass(frozen=True, slots=True)
class TrainingRates:
    """Tokens per second with nobody to serve, and beside serving steps."""

    alone: float
    beside: float


@dataclass(frozen=True, slots=True)
class Paces:
    """Attributes:
    ends_s: when each of the factors was over, ascending.
    factors: times the usual duration; about 1.
    """

    ends_s: Sequence[float]
    factors: Sequence[float]

    def at(self, at_s: float) -> float:
        if not self.factors:
            return 1.0
        return self.factors[bisect.bisect_right(self.ends_s, at_s % self.ends_s[-1])]


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """Attributes:
    regimes: by the kind of step, and whether training ran beside it.
    """

    regimes: Mapping[tuple[str, bool], Regime]

    @property
    def count(self) -> int:
        return sum(map(len, self.regimes.values()))

    def expected_ms(self, step: Step, *, corun: bool) -> float:
        """What a step takes as a rule.

        Raises:
            UsageError: too few of its kind were measured.
        """
        regime = self.regimes.get((step.kind, corun))
        expected = regime.expected(features_of(step), size=size_of(step)) if regime is not None else math.nan
        if math.isnan(expected):
            how = "beside training" if corun else "alone"
            raise UsageError(
                f"the calibration has too few {step.kind} steps {how}; measure more of them",
                param="calibration",
            )
        return expected


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Args:
    name: of the machine.
    steps: what they take; see `learn`.
    paces: how the machine's pace changed while they were measured; over again when it is through.
    slots: of the appliance's pool.
    window_tokens: of a work unit.
    """

    name: str
    model: ModelShape
    steps: MeasuredSteps
    rates: TrainingRates
    slots: int
    window_tokens: int
    paces: Paces = field(default_factory=lambda: Paces((), ()))

    @property
    def splits(self) -> tuple[Split, ...]:
        return ()

    @property
    def fuses(self) -> bool:
        return True

    @property
    def layers(self) -> int:
        return self.model.layers

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.name,
            "calibrated_from_steps": self.steps.count,
            "slots": self.slots,
            "training_alone_tokens_per_s": round(self.rates.alone, 1),
            "training_beside_tokens_per_s": round(self.rates.beside, 1),
        }

    def lease_slots(self, tokens: int) -> int:
        return self.model.lease_slots(tokens)

    def pace(self, at_s: float) -> float:
        return self.paces.at(at_s)

    def solo_ms(self, work: StepWork, split: Split | None = None) -> float:
        return self.steps.expected_ms(work.step, corun=False)

    def corun_ms(self, work: StepWork, split: Split | None) -> float:
        return self.steps.expected_ms(work.step, corun=True)

    def fused_ms(self, work: StepWork, tokens: int) -> float:
        return self.solo_ms(work) + 1e3 * FORWARD_SHARE * tokens / self.rates.alone

    def training_rate(self, split: Split | None = None) -> float:
        return self.rates.alone

    def corun_training_rate(self, split: Split | None) -> float:
        return self.rates.beside


def learn(entries: Iterable[Mapping[str, Any]]) -> MeasuredSteps:
    """What measured steps tell: ``step`` (fields of `Step`), ``measured_ms`` and ``corun`` each.

    Raises:
        UsageError: an entry is not of that form.
    """
    found: defaultdict[tuple[str, bool], list[list[Any]]] = defaultdict(list)
    for number, entry in enumerate(entries, start=1):
        try:
            step, took, corun = Step(**entry["step"]), float(entry["measured_ms"]), bool(entry["corun"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"step {number} of the calibration cannot be used ({error}); measure with 'harli bench predictor'",
                param="calibration",
            ) from error
        found[step.kind, corun].append([*features_of(step), took, 0.0, size_of(step)])
    regimes = {}
    for key, samples in found.items():
        regimes[key] = Regime(QUANTILE, window=len(samples))
        regimes[key].restore(samples, ())
    return MeasuredSteps(regimes)


def paces(entries: Sequence[Mapping[str, Any]], steps: MeasuredSteps) -> Paces:
    """How many times as long as usual the decode steps took one after the other; `entries` as `learn` takes them.

    Reading a prompt is off by more than the machine's pace, so prompts are left out.
    """
    decodes = [entry for entry in entries if entry["step"]["kind"] == "decode"]
    ratios = [
        entry["measured_ms"] / steps.expected_ms(Step(**entry["step"]), corun=entry["corun"])
        for entry in decodes
    ]
    ends = itertools.accumulate(entry["measured_ms"] / 1e3 for entry in decodes)
    return Paces(tuple(ends), tuple(ratios))
