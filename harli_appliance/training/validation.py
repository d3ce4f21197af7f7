"""Loss on held-out examples: when it is computed, which steps were the best, and when there is no hope of better.

Knows packed sequences and numbers; does not know units or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harli_appliance.training.packing import Encoded, PackedSequence, pack


@dataclass(frozen=True, slots=True)
class Standing:
    """What evaluations have shown up to now.

    Attributes:
        step: optimizer steps before the last evaluation, 0 when there was none.
        loss: what that evaluation found.
        best_step, best_loss: of the best evaluation.
        stale: evaluations since the best one.
    """

    step: int = 0
    loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0

    def after(self, step: int, loss: float) -> Standing:
        """The standing once step `step` has been found to have `loss`; one that is NaN is no improvement."""
        best = math.inf if self.best_loss is None or math.isnan(self.best_loss) else self.best_loss
        if loss < best or self.best_loss is None:
            return Standing(step, loss, step, loss)
        return Standing(step, loss, self.best_step, self.best_loss, self.stale + 1)


class Validation:
    """Held-out examples, packed, and how the job stands on them.

    Args:
        every: optimizer steps between two evaluations; the last step is always evaluated.
        patience: so many evaluations without improvement end the job; 0 never does.
    """

    def __init__(
        self, examples: Sequence[Encoded], sequence_tokens: int, *, every: int, patience: int
    ) -> None:
        self.examples = examples
        self.packs: list[PackedSequence] = pack(examples, sequence_tokens) if examples else []
        self.standing = Standing()
        self._every = every
        self._patience = patience

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the weights after `step` optimizer steps have yet to be evaluated."""
        wanted = step > 0 and (step % self._every == 0 or step == total_steps)
        return bool(self.packs) and wanted and self.standing.step < step

    @property
    def hopeless(self) -> bool:
        return 0 < self._patience <= self.standing.stale
