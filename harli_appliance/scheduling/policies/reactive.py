"""`adaptive` without its predictor: training runs while no request is behind its deadline.

It looks at what has happened, not at what the next step would take: training stops when the tightest deadline
is less than one promised token away, and begins again when it is two away.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.hysteresis import Hysteresis
from harli_appliance.scheduling.policies.policy import Policy, Situation, beside, pause
from harli_appliance.scheduling.types import Costs, Decision, Step


class Reactive(Policy):
    def __init__(self) -> None:
        self._running = Hysteresis()

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        if self._running.update(now.slack_ms - now.tpot_ms, now.tpot_ms):
            return beside("slack_left", None, None)
        return pause("no_slack", None)
