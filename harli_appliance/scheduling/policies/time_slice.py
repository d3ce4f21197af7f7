"""One after the other: after a decode step, as many whole units as the slack leaves room for.

Not after a prefill step: a request that has its first token by then is due the next one soon, which the slack
before the step does not tell.
"""

from __future__ import annotations

import math

from harli_appliance.scheduling.policies.policy import MOST_UNITS, Policy, Situation, pause
from harli_appliance.scheduling.types import UNLIMITED, Costs, Decision, Step


class TimeSlice(Policy):
    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        bound = costs.solo(step)
        if bound is None or not math.isfinite(now.outlook.unit_ms):
            return pause("no_prediction", bound)
        if step.kind == "prefill":
            return pause("no_slack", bound)
        # This step and the next one must both fit beside the units that run between them.
        spare = now.slack_ms - 2 * bound.upper_ms
        units = UNLIMITED if math.isinf(spare) else max(0, int(spare / now.outlook.unit_ms))
        if units == 0:
            return pause("no_slack", bound)
        return Decision("time_slice", "slack_left", units=min(units, MOST_UNITS), bound=bound)
