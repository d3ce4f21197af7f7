"""Requests wait while training has work: the baseline of finetuning throughput."""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Situation, pause
from harli_appliance.scheduling.types import UNLIMITED, Costs, Decision


class TrainOnly:
    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.outlook.ready:
            return Decision("training", "policy_train_only", serve=False, units=UNLIMITED)
        if now.step is None:
            return Decision("idle", "nothing_to_do", serve=False, units=0)
        return pause("no_training_work", costs.solo(now.step))
