"""The decision of each tick, and what is learned from how it went.

Joins the predictor with the policy in force. Knows no torch, no lanes and no clock: times come in as
arguments, and the same calls in the same order give the same decisions, so that a simulator can make them in
the engine's place. A tick calls `admits`, `decide`, and `observe` when a step was run; `ended` follows for
every request that the step ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from harli_appliance.scheduling.policies import Policy, Situation, make_policy
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Admission, Decision, Outlook, Queue, Split, Step


class Scheduler:
    """Chooses mode and work units for every tick.

    Args:
        policy: name of the policy to start with; see `names.POLICY_NAMES`.
        splits: the ways in which the device can be divided at run time; none where it is divided once for all.
    """

    def __init__(self, predictor: Predictor, policy: str, splits: Sequence[Split] = ()) -> None:
        self.predictor = predictor
        self._splits = tuple(splits)
        self._ended = self._missed = 0
        self.use(policy)

    def use(self, policy: str) -> None:
        """Follow another policy from now on.

        Raises:
            UsageError: there is none of that name.
        """
        self._policy: Policy = make_policy(policy, self._splits)
        self.policy_name = policy
        self._ended = self._missed = 0

    @property
    def fuses(self) -> bool:
        """Whether the policy in force may fuse steps with training."""
        return self._policy.fuses

    @property
    def elastic(self) -> bool:
        """Whether serving takes back slots that training holds, under the policy in force."""
        return self._policy.elastic

    def admits(self, queue: Queue | None, outlook: Outlook) -> Admission:
        """Which requests the next step may be planned from.

        Args:
            queue: None when no prompt waits.
        """
        return self._policy.admits(queue, outlook, self.predictor)

    def decide(self, step: Step | None, slack_ms: float, tpot_ms: float, outlook: Outlook) -> Decision:
        """What this tick does; the fields of `Situation`."""
        now = Situation(step, slack_ms, tpot_ms, outlook, self._ended, self._missed)
        return self._policy.decide(now, self.predictor)

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

    def ended(self, met: bool) -> None:
        """Learn from a request that has ended: whether it met its targets."""
        self._ended += 1
        self._missed += not met
