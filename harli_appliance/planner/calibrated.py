"""A device whose costs were measured: steps that a real appliance made, and how fast it trained.

Steps alone and beside training are what a predictor expects after it has learned from the measured ones. How
much slower or faster they were from moment to moment, on a machine that is shared, is replayed as it was. The
device is divided in one way, as a CPU is between its lanes, so a fused step is the training window's forward
pass and then the step, on the same lane.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harli_appliance.errors import UsageError
from harli_appliance.planner.device import StepWork
from harli_appliance.planner.shapes import ModelShape
from harli_appliance.planner.training import FORWARD_SHARE
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Split, Step


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
class Calibrated:
    """Args:
    name: of the machine.
    predictor: has learned from steps of every kind; see `learn`.
    paces: how the machine's pace changed while it did; over again when it is through.
    slots: of the appliance's pool.
    window_tokens: of a work unit.
    """

    name: str
    model: ModelShape
    predictor: Predictor
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
            "calibrated_from_steps": self.predictor.samples,
            "slots": self.slots,
            "training_alone_tokens_per_s": round(self.rates.alone, 1),
            "training_beside_tokens_per_s": round(self.rates.beside, 1),
        }

    def lease_slots(self, tokens: int) -> int:
        return self.model.lease_slots(tokens)

    def pace(self, at_s: float) -> float:
        return self.paces.at(at_s)

    def solo_ms(self, work: StepWork, split: Split | None = None) -> float:
        return _known(self.predictor, work.step, corun=False)

    def corun_ms(self, work: StepWork, split: Split | None) -> float:
        return _known(self.predictor, work.step, corun=True)

    def fused_ms(self, work: StepWork, tokens: int) -> float:
        return self.solo_ms(work) + 1e3 * FORWARD_SHARE * tokens / self.rates.alone

    def training_rate(self, split: Split | None = None) -> float:
        return self.rates.alone

    def corun_training_rate(self, split: Split | None) -> float:
        return self.rates.beside


def _known(predictor: Predictor, step: Step, *, corun: bool) -> float:
    """What the step takes at the machine's usual pace."""
    bound = predictor.corun(step) if corun else predictor.solo(step)
    if bound is None:
        how = "beside training" if corun else "alone"
        raise UsageError(
            f"the calibration has too few {step.kind} steps {how}; measure more of them", param="calibration"
        )
    return bound.expected_ms / predictor.pace


def paces(steps: Sequence[Mapping[str, Any]], predictor: Predictor) -> Paces:
    """How many times as long as usual the decode steps took one after the other; `steps` as `learn` takes them.

    Reading a prompt is off by more than the machine's pace, so prompts are left out.
    """
    decodes = [entry for entry in steps if entry["step"]["kind"] == "decode"]
    ratios = [
        entry["measured_ms"] / _known(predictor, Step(**entry["step"]), corun=entry["corun"])
        for entry in decodes
    ]
    usual = statistics.median(ratios) if ratios else 1.0
    ends = itertools.accumulate(entry["measured_ms"] / 1e3 for entry in decodes)
    return Paces(tuple(ends), tuple(ratio / usual for ratio in ratios))


def learn(steps: Iterable[Mapping[str, Any]]) -> Predictor:
    """A predictor that knows measured steps: ``step`` (fields of `Step`), ``measured_ms`` and ``corun`` each.

    Raises:
        UsageError: an entry is not of that form.
    """
    predictor = Predictor()
    for number, entry in enumerate(steps, start=1):
        try:
            step, took, corun = Step(**entry["step"]), float(entry["measured_ms"]), bool(entry["corun"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"step {number} of the calibration cannot be used ({error}); measure with 'harli bench predictor'",
                param="calibration",
            ) from error
        predictor.observe(step, took, corun=corun)
    return predictor
