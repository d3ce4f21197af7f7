"""Two lanes and no control: training runs beside whatever is served.

What two processes on one device would do (training and serving under MPS, say). It asks no prediction for leave.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Policy, Situation, beside
from harli_appliance.scheduling.types import Costs, Decision, Step


class Naive(Policy):
    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        return beside("policy_naive", costs.corun(step), None)
