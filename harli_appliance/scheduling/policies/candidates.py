"""What a step could do on a device with several splits, and what each of these costs training.

Serving has to be done; a choice is good that leaves training much of the device for each step served. With R
the tokens that training makes per second when it has the whole device, and R_c beside a step that takes t_c,
that step costs training

    L_c = (R - R_c) t_c   tokens,

which is R t for a step alone, and less what was passed forward, a third of a token's work each, for a fused
step. But
steps need not be frequent: each may take the promised time per token T. Stretching the time from step to step
by a millisecond saves that share of a step, L / T tokens with L the cost of the cheapest step there is. So
the choice is the one with the least

    L_c - (L / T) t_c

among those for which there is time. A slice of training after a step stretches it without further cost.

Knows predictions. Which of them there is time for is for the policy to say (`Room`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harli_appliance.scheduling.policies.policy import Situation, beside, pause
from harli_appliance.scheduling.types import Bound, Costs, Decision, Split, Step

FORWARD_SHARE = 1.0 / 3.0
"""Of a token's work: 2 of 6 FLOPs a parameter, since backward computes each layer again."""
FUSED_TOKENS = (64, 128, 192, 256, 384, 512)
MOST_UNITS = 64
"""Of one slice, however much room there is: a request that arrives waits for the slice to end."""


@dataclass(frozen=True, slots=True)
class Room:
    """How long a tick may take; it may take as long as either rule allows, but never miss a deadline.

    Attributes:
        pace_ms: at which requests keep up with the promise, compared with what is expected.
        spend_ms: that requests are ahead, compared with the bound.
        slack_ms: until the tightest deadline, compared with the bound.
    """

    pace_ms: float
    spend_ms: float
    slack_ms: float

    def holds(self, bound: Bound) -> bool:
        if bound.upper_ms > self.slack_ms:
            return False
        return bound.expected_ms <= self.pace_ms or bound.upper_ms <= self.spend_ms


def cheapest(
    step: Step, solo: Bound, now: Situation, room: Room, splits: Sequence[Split], costs: Costs
) -> Decision | None:
    """The best of what there is room for; None while nothing is known of how fast training is.

    A step that processes prompts is bound by compute, which training beside it would only take away from it:
    such steps run alone.
    """
    alone_rate = costs.training_rate()
    if not math.isfinite(alone_rate):
        return None
    alone_cost = alone_rate * solo.expected_ms
    found: list[tuple[float, Bound, Split | int]] = []
    if step.kind == "decode":
        for split in splits:
            bound, rate = costs.corun(step, split), costs.training_rate(split)
            if bound is not None and room.holds(bound) and math.isfinite(rate):
                cost = (alone_rate - rate) * bound.expected_ms
                found.append((cost, bound, split))
        for tokens in FUSED_TOKENS:
            if tokens > now.outlook.fusible_tokens:
                break
            bound = costs.fused(step, tokens)
            if bound is not None and room.holds(bound):
                cost = alone_rate * bound.expected_ms - 1e3 * FORWARD_SHARE * tokens
                found.append((cost, bound, tokens))
    least = min((cost for cost, _, _ in found), default=alone_cost)
    price = max(0.0, least) / now.tpot_ms
    units = slice_units(step, solo, now, room)
    alone_score = alone_cost - price * (solo.expected_ms + (units * now.outlook.unit_ms if units else 0.0))
    score, bound, choice = min(
        ((cost - price * bound.expected_ms, bound, choice) for cost, bound, choice in found),
        key=lambda option: option[0],
        default=(math.inf, solo, 0),
    )
    if alone_score <= score:
        if units:
            return Decision("time_slice", "slack_left", serve=True, units=units, bound=solo)
        return pause("keeps_reserve", solo)
    if isinstance(choice, Split):
        return beside("corun_fits", bound, choice)
    return Decision("fused", "fused_fits", serve=True, units=1, bound=bound, fused_tokens=choice)


def slice_units(step: Step, solo: Bound, now: Situation, room: Room) -> int:
    """Whole units that fit between this step and the next; after a decode step every deadline is one token later.

    None after a prefill step: a request that has its first token by then is due the next one soon.
    """
    unit_ms = now.outlook.unit_ms
    if step.kind == "prefill" or not math.isfinite(unit_ms):
        return 0
    until_next = room.slack_ms + now.tpot_ms - 2 * solo.upper_ms
    ahead = room.spend_ms + now.tpot_ms - 2 * solo.upper_ms
    time = min(until_next, max(room.pace_ms - solo.expected_ms, ahead))
    return max(0, int(min(time / unit_ms, MOST_UNITS)))
