"""Requests wait while training has work: the baseline of finetuning throughput."""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Policy, Situation
from harli_appliance.scheduling.types import UNLIMITED, Admission, Costs, Decision, Outlook, Queue, Step


class TrainOnly(Policy):
    def admits(self, queue: Queue | None, outlook: Outlook, costs: Costs) -> Admission:
        return "none" if outlook.ready else "all"

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        return Decision("training", "policy_train_only", units=UNLIMITED)
