"""A device whose costs were measured: steps that a real appliance made, and how fast it trained.

How much slower or faster than as a rule the machine was from moment to moment is replayed as it was. The device is
divided in one way, as a CPU is between its lanes, so a fused step is the training window's forward pass and then
the step, on the same lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from harli_appliance.planner.device import StepWork, UnitMix
from harli_appliance.planner.measured_steps import MeasuredSteps
from harli_appliance.planner.paces import Paces, TrainingRates
from harli_appliance.planner.shapes import ModelShape
from harli_appliance.scheduling.types import Split


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Args:
    name: of the machine.
    steps: what they take as a rule.
    paces: how the machine's pace changed while that was measured; over again when it is through.
    slots: of the appliance's pool.
    window_tokens: of a work unit.
    noises: factors of which every step has one.
    """

    name: str
    model: ModelShape
    steps: MeasuredSteps
    rates: TrainingRates
    slots: int
    window_tokens: int
    units: UnitMix
    paces: Paces = field(default_factory=Paces)
    noises: Sequence[float] = (1.0,)

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

    def noise(self, random: Random) -> float:
        return self.noises[random.randrange(len(self.noises))]

    def solo_ms(self, work: StepWork, split: Split | None = None) -> float:
        return self.steps.expected_ms(work.step, corun=False)

    def corun_ms(self, work: StepWork, split: Split | None) -> float:
        return self.steps.expected_ms(work.step, corun=True)

    def fused_ms(self, work: StepWork, tokens: int, split: Split | None = None) -> float:
        return self.solo_ms(work) + 1e3 * self.units.forward_share * tokens / self.rates.alone

    def training_rate(self, split: Split | None = None) -> float:
        return self.rates.alone

    def corun_training_rate(self, split: Split | None) -> float:
        return self.rates.beside
