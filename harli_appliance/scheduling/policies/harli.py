"""Each step on its own: training beside it when the predicted step fits the promised time per token.

The check of Harli (arXiv 2511.11729): a two-stage latency prediction, compared with the QoS target before
every step; of the splits of the device that pass, the one that leaves training most. What earlier steps
gained is not banked, so a step that alone takes longer than the target never has training beside it. The
paper serves prefill elsewhere; here a prompt's chunk passes the same check. The prediction is the calibrated
bound that every policy here uses, not the expected value.
"""

from __future__ import annotations

from collections.abc import Sequence

from harli_appliance.scheduling.policies.corun_bound import corun_bound
from harli_appliance.scheduling.policies.policy import Policy, Situation, beside, pause
from harli_appliance.scheduling.types import Costs, Decision, Split, Step


class Harli(Policy):
    """Args: splits: ways to divide the device; (None,) where there is only one."""

    def __init__(self, splits: Sequence[Split | None]) -> None:
        self._splits = sorted(splits, key=lambda split: split.training if split else 0.0, reverse=True)

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        unknown = True
        for split in self._splits:
            bound = corun_bound(step, costs, split)
            if bound is not None and bound.upper_ms <= now.tpot_ms:
                return beside("corun_fits", bound, split)
            unknown &= bound is None
        return pause("no_prediction" if unknown else "corun_too_slow", costs.solo(step))
