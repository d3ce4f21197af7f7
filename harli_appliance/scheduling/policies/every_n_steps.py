"""Training takes a turn after every N decode steps, whatever the requests' deadlines are.

The fixed temporal sharing that FlexLLM (arXiv 2402.18789) is compared with: one finetuning iteration for every
N inference iterations. A turn is therefore one micro-batch: forward and backward of one packed sequence, with the
optimizer's step where one follows. It asks no prediction for leave, so every running request waits for the whole
turn. Counted are decode steps while training has work.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Policy, Situation, pause
from harli_appliance.scheduling.types import Costs, Decision, Step


class EveryNSteps(Policy):
    """Args: steps: decode steps between two turns."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._since = 0

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        bound = costs.solo(step)
        self._since += step.kind == "decode"
        if self._since < self._steps:
            return pause("not_its_turn", bound)
        self._since = 0
        units = max(1, now.outlook.micro_batch_units)
        return Decision("time_slice", "its_turn", units=units, bound=bound)
