"""Both lanes at once whenever the co-run bound fits the slack; serving alone otherwise."""

from __future__ import annotations

from harli_appliance.scheduling.policies.policy import Situation, pause, without_serving
from harli_appliance.scheduling.types import UNLIMITED, Bound, Costs, Decision

PRIOR = 1.5
"""Slowdown assumed of a co-run while none has been measured; beyond any published penalty (1.24)."""


class Adaptive:
    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.step is None:
            return without_serving(now)
        solo = costs.solo(now.step)
        if not now.outlook.ready:
            return pause("no_training_work", solo)
        if solo is None:
            return pause("no_prediction", None)
        bound = costs.corun(now.step)
        reason = "corun_fits"
        if bound is None:
            bound = Bound(solo.expected_ms * PRIOR, solo.upper_ms * PRIOR)
            reason = "corun_prior_fits"
        if bound.upper_ms > now.slack_ms:
            return pause("corun_too_slow", solo)
        return Decision("partition", reason, serve=True, units=UNLIMITED, bound=bound)
