"""Two lanes and no control: training runs beside whatever is served.

What two processes on one device would do (training and serving under MPS, say). It asks no prediction for leave.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Situation, pause, without_serving
from harli_appliance.scheduling.types import UNLIMITED, Costs, Decision


class Naive:
    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.step is None:
            return without_serving(now)
        if not now.outlook.ready:
            return pause("no_training_work", costs.solo(now.step))
        bound = costs.corun(now.step)
        return Decision("partition", "policy_naive", serve=True, units=UNLIMITED, bound=bound)
