"""Training never runs: the baseline of the latency promise."""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Policy, Situation, pause
from harli_appliance.scheduling.types import Costs, Decision, Outlook, Step


class ServeOnly(Policy):
    def alone(self, outlook: Outlook) -> Decision:
        return Decision("idle", "policy_serve_only", units=0)

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        return pause("policy_serve_only", costs.solo(step))
