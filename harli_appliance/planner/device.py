"""What a simulated device is to the simulator: how long things take on it. Milliseconds, tokens, splits.

`roofline` computes it from published figures, `calibrated` takes it from measurements. Knows no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from harli_appliance.scheduling.types import FORWARD_SHARE, Split, Step


@dataclass(frozen=True, slots=True)
class StepWork:
    """A serving step, as exactly as its cost needs it.

    Attributes:
        step: as the predictor sees it.
        pairs: query tokens times the keys that each attends to, summed.
    """

    step: Step
    pairs: float

    @property
    def tokens(self) -> int:
        """Tokens that pass the layers."""
        return self.step.prefill_tokens if self.step.kind == "prefill" else self.step.batch


def decode_work(batch: int, context_tokens: int) -> StepWork:
    """A decode step of `batch` requests that read `context_tokens` rows in all."""
    return StepWork(Step("decode", batch, context_tokens), float(context_tokens))


@dataclass(frozen=True, slots=True)
class UnitMix:
    """The work units that a window goes through.

    Attributes:
        forward: how many of them are its forward pass.
        backward: how many follow: loss, what is computed again, and gradients.
        forward_share: of the work.
        slowest: times as long as a mean unit is one of the slowest kind.
        slow_share: of the units that are of that kind.
    """

    forward: float
    backward: float
    forward_share: float = FORWARD_SHARE
    slowest: float = 2.0 * (1.0 - FORWARD_SHARE)
    slow_share: float = 0.5


class Device(Protocol):
    """True costs, without noise. `split` None is the whole device."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """Ways to divide it; empty where there is only one, which is then written None."""
        ...

    @property
    def slots(self) -> int:
        """KV-cache slots that serving and training share."""
        ...

    @property
    def layers(self) -> int: ...

    @property
    def window_tokens(self) -> int:
        """Of a work unit, which runs one layer over them."""
        ...

    @property
    def units(self) -> UnitMix: ...

    @property
    def fuses(self) -> bool:
        """Whether training tokens can join a serving step's pass."""
        ...

    def describe(self) -> dict[str, Any]:
        """For reports: its name, and the figures that its costs come from."""
        ...

    def lease_slots(self, tokens: int) -> int:
        """Slots that a micro-batch of `tokens` tokens needs."""
        ...

    def pace(self, at_s: float) -> float:
        """How many times longer than usual everything takes at that time; 1 on a device that is nobody else's."""
        ...

    def noise(self, random: Random) -> float:
        """How many times longer than its cost one step takes, at that pace; about 1."""
        ...

    def solo_ms(self, work: StepWork, split: Split | None = None) -> float:
        """The step with nothing beside it."""
        ...

    def corun_ms(self, work: StepWork, split: Split | None) -> float:
        """The step with training beside it; None is the one way that a device without splits has."""
        ...

    def fused_ms(self, work: StepWork, tokens: int, split: Split | None = None) -> float:
        """The step with the forward pass of `tokens` training tokens in the same pass."""
        ...

    def training_rate(self, split: Split | None = None) -> float:
        """Tokens/s, forward and backward, on the whole device with nothing beside it."""
        ...

    def corun_training_rate(self, split: Split | None) -> float:
        """Tokens/s beside serving."""
        ...
