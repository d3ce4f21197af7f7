"""Whether a job fits the pool: its adapter's state and one micro-batch at a time.

The smallest micro-batch of a job holds its longest example; shorter ones are packed together as far as there is
room. Knows sizes in slots; does not know who holds slots now.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from harli_appliance.training.activations import footprint
from harli_appliance.training.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Fit:
    """A job's needs against what can be leased, in slots.

    Attributes:
        state: for the adapter's weights, gradients and moments.
        batch: for a micro-batch of the longest example alone.
        longest: tokens of that example.
        leasable: the most that can ever be leased at once.
    """

    state: int
    batch: int
    longest: int
    leasable: int

    @property
    def fits(self) -> bool:
        return self.state + self.batch <= self.leasable

    def refusal(self) -> str:
        """One line for a job that does not fit."""
        return (
            f"the job needs {self.state + self.batch} slots of the pool ({self.state} for its adapter and "
            f"{self.batch} for its longest example of {self.longest} tokens), but at most {self.leasable} can be "
            "leased; raise memory.pool_slots, train fewer adapter parameters or shorten the example"
        )


def fit(backbone: Backbone, state: int, longest: int, leasable: int) -> Fit:
    return Fit(state, footprint(backbone, longest).slots, longest, leasable)


def fitting_tokens(backbone: Backbone, slots: int) -> int:
    """Tokens of the longest micro-batch that fits into so many slots."""
    return (
        bisect_right(range(max(0, slots) + 1), slots, key=lambda tokens: footprint(backbone, tokens).slots)
        - 1
    )
