"""One fixed division of the device, chosen beforehand: training always runs on its part of it.

What a careful operator gets from SM partitions (MIG, MPS percentages) without a scheduler. The best static
split for a load is the strongest rival of a scheduler that chooses per step. It asks no prediction for leave.
On a device with one split it is `naive`.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Policy, Situation, beside
from harli_appliance.scheduling.types import Costs, Decision, Split, Step


class Static(Policy):
    def __init__(self, split: Split | None) -> None:
        self._split = split

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        return beside("policy_static", costs.corun(step, self._split), self._split)
