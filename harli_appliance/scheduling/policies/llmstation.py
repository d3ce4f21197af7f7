"""Tasklets of a fixed size beside every step, and a wait for the slower of the two.

LLMStation (ATC 2025) cuts finetuning into tasklets that can be suspended, runs them beside inference
iterations, and joins both before the next iteration. How many units make a tasklet is found beforehand: as
many as take no longer than the promised time per token. It is taken once, when the promise or the policy is
new, and then stays.

What differs from the paper: a tasklet is made of our work units, and runs on the training lane.
"""

from __future__ import annotations

import math

from harli_appliance.scheduling.policies.policy import Policy, Situation
from harli_appliance.scheduling.types import Costs, Decision, Step


class LlmStation(Policy):
    def __init__(self) -> None:
        self._promise = math.nan
        self._units = 1

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        if now.tpot_ms != self._promise and math.isfinite(now.outlook.unit_ms):
            self._promise = now.tpot_ms
            self._units = max(1, int(now.tpot_ms / now.outlook.unit_ms))
        bound = costs.corun(step)
        return Decision("partition", "its_tasklet", units=self._units, bound=bound)
