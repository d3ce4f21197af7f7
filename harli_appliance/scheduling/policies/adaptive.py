"""Training beside serving whenever the bound of the slower step leaves the reserve untouched.

Requests bank what they gain on the promise (see `scheduling.slo`), and co-running steps may spend it, all but a
reserve: a prompt that arrives makes running requests wait, which must not push them over. A co-run that is slower
than the promised time per token drains the slack, so once training was stopped it starts again only when there is
room for a few steps in a row.
"""

from __future__ import annotations

from harli_appliance.scheduling.policies.corun_bound import corun_bound
from harli_appliance.scheduling.policies.hysteresis import Hysteresis
from harli_appliance.scheduling.policies.policy import Situation, pause, without_serving
from harli_appliance.scheduling.policies.reserve import Reserve
from harli_appliance.scheduling.types import UNLIMITED, Costs, Decision

STEPS_IN_A_ROW = 4
"""Co-run steps that the slack must hold before training starts again."""


class Adaptive:
    def __init__(self) -> None:
        self._reserve = Reserve()
        self._corun = Hysteresis()

    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.step is None:
            return without_serving(now)
        self._reserve.see(now.step, costs)
        solo = costs.solo(now.step)
        if not now.outlook.ready:
            return pause("no_training_work", solo)
        if solo is None:
            return pause("no_prediction", None)
        bound, measured = corun_bound(now.step, solo, costs)
        room = now.slack_ms - bound.upper_ms - self._reserve.ms(now.tpot_ms)
        drain = max(0.0, bound.upper_ms - now.tpot_ms)
        if not self._corun.update(room, STEPS_IN_A_ROW * drain):
            too_slow = bound.upper_ms > now.slack_ms
            return pause("corun_too_slow" if too_slow else "keeps_reserve", solo)
        reason = "corun_fits" if measured else "corun_prior_fits"
        return Decision("partition", reason, serve=True, units=UNLIMITED, bound=bound)
