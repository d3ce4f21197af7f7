"""Requests wait while training has work: the baseline of finetuning throughput."""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Policy, Situation
from harli_appliance.scheduling.types import UNLIMITED, Costs, Decision, Step


class TrainOnly(Policy):
    holds_requests = True

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        return Decision("training", "policy_train_only", serve=False, units=UNLIMITED)
