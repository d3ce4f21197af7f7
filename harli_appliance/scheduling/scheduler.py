"""The decision of each tick, and what is learned from how it went.

Joins the predictor with the policy in force. Knows no torch, no lanes and no clock; times come in as arguments.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies import Policy, Situation, make_policy
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Decision, Outlook, Split, Step


class Scheduler:
    """Chooses mode and work units for every tick.

    Args:
        policy: name of the policy to start with; see `names.POLICY_NAMES`.
    """

    def __init__(self, predictor: Predictor, policy: str) -> None:
        self.predictor = predictor
        self.use(policy)

    def use(self, policy: str) -> None:
        """Follow another policy from now on.

        Raises:
            UsageError: there is none of that name.
        """
        self._policy: Policy = make_policy(policy)
        self.policy_name = policy

    def admits(self, outlook: Outlook) -> bool:
        """Whether requests may be planned now; only `train_only` holds them back."""
        return not (self.policy_name == "train_only" and outlook.ready)

    def decide(self, step: Step | None, slack_ms: float, tpot_ms: float, outlook: Outlook) -> Decision:
        """What this tick does; the fields of `Situation`."""
        return self._policy.decide(Situation(step, slack_ms, tpot_ms, outlook), self.predictor)

    def observe(
        self,
        step: Step,
        measured_ms: float,
        *,
        corun: bool,
        split: Split | None = None,
        fused_tokens: int = 0,
    ) -> None:
        """Learn from a step.

        Args:
            corun: whether training ran beside it for its whole duration; steps that saw only part of a
                unit belong to neither regime and must not be passed.
            split: how the device was divided.
            fused_tokens: training tokens that were in the same pass.
        """
        self.predictor.observe(step, measured_ms, corun=corun, split=split, fused_tokens=fused_tokens)
