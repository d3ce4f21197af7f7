"""A device whose costs were measured: steps that a real appliance made, and how fast it trained.

Steps alone and beside training are what a predictor expects after it has learned from the measured ones. The
device is divided in one way, as a CPU is between its lanes, so a fused step is the training window's forward
pass and then the step, on the same lane. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harli_appliance.errors import UsageError
from harli_appliance.planner.device import StepWork
from harli_appliance.planner.shapes import ModelShape
from harli_appliance.planner.training import FORWARD_SHARE
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Bound, Split, Step


@dataclass(frozen=True, slots=True)
class TrainingRates:
    """Tokens per second with nobody to serve, and beside serving steps."""

    alone: float
    beside: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Args:
    name: of the machine.
    predictor: has learned from steps of every kind; see `learn`.
    slots: of the appliance's pool.
    window_tokens: of a work unit.
    """

    name: str
    model: ModelShape
    predictor: Predictor
    rates: TrainingRates
    slots: int
    window_tokens: int

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

    def solo_ms(self, work: StepWork, split: Split | None = None) -> float:
        return _known(self.predictor.solo(work.step), work.step, "alone")

    def corun_ms(self, work: StepWork, split: Split | None) -> float:
        return _known(self.predictor.corun(work.step), work.step, "beside training")

    def fused_ms(self, work: StepWork, tokens: int) -> float:
        return self.solo_ms(work) + 1e3 * FORWARD_SHARE * tokens / self.rates.alone

    def training_rate(self, split: Split | None = None) -> float:
        return self.rates.alone

    def corun_training_rate(self, split: Split | None) -> float:
        return self.rates.beside


def _known(bound: Bound | None, step: Step, how: str) -> float:
    if bound is None:
        raise UsageError(
            f"the calibration has too few {step.kind} steps {how}; measure more of them", param="calibration"
        )
    return bound.expected_ms


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
