"""What a step could do on a device with several splits, and what each of these costs training.

Serving has to be done; a choice is good that leaves training much of the device for each step served. With R
the tokens that training makes per second when it has the whole device, and R_c beside a step that takes t_c,
that step costs training

    L_c = (R - R_c) t_c   tokens,

which is R t for a step alone, and less what was passed forward, a third of a token's work each, for a fused
step. What is left of the promised time per token T after a step is training's too: a slice on the whole device,
which costs nothing more, but is of whole units, and waits for the unit that is under way beside the step to end.
So steps need not be frequent, and stretching the time from step to step by a millisecond saves a share of a step,
L / T tokens with L the cost of the cheapest step there is. The choice is the one with the least

    L_c - (L / T) (t_c + the slice that can follow it)

among those for which there is time. A slice leaves the next step time for what is cheapest at the promised pace,
also where there is no time for it now: else slices would use up the time that it needs, again and again.

Knows predictions. Which of them there is time for is for the policy to say (`Room`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from harli_appliance.scheduling.policies.policy import MOST_UNITS, Situation, beside, pause
from harli_appliance.scheduling.types import FORWARD_SHARE, Bound, Costs, Decision, Split, Step

FUSED_TOKENS = (64, 128, 192, 256, 384, 512)


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to make a step.

    Attributes:
        cost: tokens that training makes less than if it had the device meanwhile, times 1000.
        unit_ms: of a unit beside it, which has to end before a slice begins; 0 without training beside it.
    """

    decision: Decision
    bound: Bound
    cost: float
    unit_ms: float = 0.0


def cheapest(
    step: Step,
    solo: Bound,
    now: Situation,
    room: Room,
    splits: Sequence[Split],
    costs: Costs,
    gets_ahead: Callable[[Bound, float], bool] | None = None,
) -> Decision | None:
    """The best of what there is room for; None while nothing is known of how fast training is.

    A step that processes prompts is bound by compute, which training beside it would only take away from it:
    such steps run alone.

    Args:
        gets_ahead: where answers shall get ahead of their deadlines: whether they do so well enough in steps of
            that bound, at the promised time per token. What costs least for each millisecond gained is chosen.
    """
    alone_rate = costs.training_rate()
    if not math.isfinite(alone_rate):
        return None
    alone = Candidate(pause("keeps_reserve", solo), solo, alone_rate * solo.expected_ms)
    if step.kind == "prefill":
        return alone.decision
    others = [*_beside(step, now, splits, costs, alone_rate), *_fused(step, now, costs, alone_rate)]
    fitting = [alone, *(candidate for candidate in others if room.holds(candidate.bound))]
    if gets_ahead is not None:
        return _gaining(alone, fitting, now.tpot_ms, gets_ahead)
    lasting = [c for c in others if c.bound.expected_ms <= room.pace_ms and c.bound.upper_ms <= now.tpot_ms]
    next_ms = min([alone, *lasting], key=lambda c: c.cost).bound.upper_ms
    price = max(0.0, min(candidate.cost for candidate in fitting)) / now.tpot_ms
    found: list[tuple[float, Candidate, int]] = []
    for candidate in fitting:
        units = slice_units(candidate, next_ms, now, room)
        stretched_ms = candidate.bound.expected_ms + (units * now.outlook.unit_ms if units else 0.0)
        found.append((candidate.cost - price * stretched_ms, candidate, units))
    _, chosen, units = min(found, key=lambda option: option[0])
    if not units:
        return chosen.decision
    if chosen is alone:
        return Decision("time_slice", "slack_left", units=units, bound=solo)
    return replace(chosen.decision, after=units)


def _gaining(
    alone: Candidate, fitting: Sequence[Candidate], tpot_ms: float, gets_ahead: Callable[[Bound, float], bool]
) -> Decision:
    """The step that costs training least for each millisecond by which answers get ahead."""
    gaining = [
        c for c in fitting if c.bound.expected_ms < tpot_ms and (c is alone or gets_ahead(c.bound, tpot_ms))
    ]
    return min(gaining or [alone], key=lambda c: c.cost / (tpot_ms - c.bound.expected_ms)).decision


def _beside(
    step: Step, now: Situation, splits: Sequence[Split], costs: Costs, alone_rate: float
) -> Iterator[Candidate]:
    for split in splits:
        bound, rate = costs.corun(step, split), costs.training_rate(split)
        if bound is not None and math.isfinite(rate):
            unit_ms = now.outlook.unit_ms * alone_rate / rate if rate > 0.0 else math.inf
            cost = (alone_rate - rate) * bound.expected_ms
            yield Candidate(beside("corun_fits", bound, split), bound, cost, unit_ms)


def _fused(step: Step, now: Situation, costs: Costs, alone_rate: float) -> Iterator[Candidate]:
    for tokens in FUSED_TOKENS:
        if tokens > now.outlook.fusible_tokens:
            break
        bound = costs.fused(step, tokens)
        if bound is not None:
            decision = Decision("fused", "fused_fits", units=1, bound=bound, fused_tokens=tokens)
            yield Candidate(decision, bound, alone_rate * bound.expected_ms - 1e3 * FORWARD_SHARE * tokens)


def slice_units(candidate: Candidate, next_ms: float, now: Situation, room: Room) -> int:
    """Whole units that fit between this step and the next; after a decode step every deadline is one token later.

    Args:
        next_ms: that the next step may take.
    """
    unit_ms, bound = now.outlook.unit_ms, candidate.bound
    if not math.isfinite(unit_ms):
        return 0
    both_ms = bound.upper_ms + candidate.unit_ms + next_ms
    until_next = room.slack_ms + now.tpot_ms - both_ms
    ahead = room.spend_ms + now.tpot_ms - both_ms
    time = min(until_next, max(room.pace_ms - bound.expected_ms - candidate.unit_ms, ahead))
    return max(0, int(min(time / unit_ms, MOST_UNITS)))
