"""Each step on its own: training beside it when the predicted step fits the promised time per token.

The check of Harli (arXiv 2511.11729): a two-stage latency prediction, compared with the QoS target before every
step. What earlier steps gained is not banked, so a step that alone takes longer than the target never has training
beside it. The paper serves prefill elsewhere; here a prompt's chunk passes the same check. The prediction is the
calibrated bound that every policy here uses, not the expected value.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.corun_bound import corun_bound
from harli_appliance.scheduling.policies.policy import Situation, pause, without_serving
from harli_appliance.scheduling.types import UNLIMITED, Costs, Decision


class Harli:
    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.step is None:
            return without_serving(now)
        solo = costs.solo(now.step)
        if not now.outlook.ready:
            return pause("no_training_work", solo)
        if solo is None:
            return pause("no_prediction", None)
        bound, measured = corun_bound(now.step, solo, costs)
        if bound.upper_ms > now.tpot_ms:
            return pause("corun_too_slow", solo)
        reason = "corun_fits" if measured else "corun_prior_fits"
        return Decision("partition", reason, serve=True, units=UNLIMITED, bound=bound)
