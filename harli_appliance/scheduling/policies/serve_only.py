"""Training never runs: the baseline of the latency promise."""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Situation, pause
from harli_appliance.scheduling.types import Costs, Decision


class ServeOnly:
    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.step is None:
            return Decision("idle", "policy_serve_only", serve=False, units=0)
        return pause("policy_serve_only", costs.solo(now.step))
