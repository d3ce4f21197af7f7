"""Training beside serving whenever requests stay, or come back, ahead of their deadlines.

Requests bank what they gain on the promise (see `scheduling.slo`), and two rules say when a step may have
training beside it. Both need the step's bound to fit the tightest deadline.

- *Keep pace*: with training beside it a token takes at most the promised time, less a margin. A token's time
  is the decode step's plus what prompts take between two of them. Slack then grows all the time, so none has
  to be there at first. The promise is a mean over many tokens, which is why it is compared with the expected
  step and not with its bound. The margin follows the requests that missed.
- *Spend slack*: what is banked beyond a reserve for the next prompt may be spent on steps that are slower
  than that. Once it was spent, there must be room for a few such steps before it begins again.

Among the splits of the device that a rule allows, the one on which training is fastest is taken; the second rule
goes first, since it allows faster ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harli_appliance.scheduling.policies.candidates import Room, cheapest
from harli_appliance.scheduling.policies.corun_bound import corun_bound
from harli_appliance.scheduling.policies.hysteresis import Hysteresis
from harli_appliance.scheduling.policies.margin import MOST, Margin
from harli_appliance.scheduling.policies.policy import Policy, Situation, beside, pause
from harli_appliance.scheduling.policies.prompts import Prompts
from harli_appliance.scheduling.policies.stalls import Stalls
from harli_appliance.scheduling.types import Bound, Costs, Decision, Split, Step

CALM = 0.8
"""Share of the stretches of prompts that the reserve holds while no request misses; all of them when many do."""
STEPS_IN_A_ROW = 4
"""Steps slower than the promise that the slack must hold before the first of them."""


class Adaptive(Policy):
    """Args: splits: ways to divide the device; (None,) where there is only one."""

    def __init__(self, splits: Sequence[Split | None]) -> None:
        self._splits = splits
        self._prompts = Prompts()
        self._margin = Margin()
        self._stalls = Stalls()
        self._spending = {split: Hysteresis() for split in splits}
        self._token_ms = dict.fromkeys(splits, 0.0)

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        solo = costs.solo(step)
        self._prompts.see(step, solo)
        margin = self._margin.after(now.ended, now.missed)
        several = [split for split in self._splits if split is not None]
        if several and solo is not None:
            pace_ms = now.tpot_ms * (1.0 - margin) - self._prompts.per_token_ms
            self._stalls.see(step, solo)
            reserve_ms = self._stalls.next_ms(CALM + (1.0 - CALM) * margin / MOST, now.tpot_ms)
            room = Room(pace_ms, now.slack_ms - reserve_ms, now.slack_ms)
            chosen = cheapest(step, solo, now, room, several, costs)
            if chosen is not None:
                return chosen
        known = self._fastest_training_first(step, costs)
        if not known:
            return pause("no_prediction", solo)
        fitting = [(split, bound) for split, bound in known if bound.upper_ms <= now.slack_ms]
        if not fitting:
            return pause("corun_too_slow", solo)
        if step.kind == "decode":
            for split, bound in known:
                self._token_ms[split] = bound.expected_ms + self._prompts.per_token_ms
        for split, bound in fitting:
            if self._may_spend(split, bound, now):
                return beside("corun_spends_slack", bound, split)
        for split, bound in fitting:
            if self._token_ms[split] <= now.tpot_ms * (1.0 - margin):
                return beside("corun_keeps_pace", bound, split)
        return pause("keeps_reserve", solo)

    def _fastest_training_first(self, step: Step, costs: Costs) -> list[tuple[Split | None, Bound]]:
        """The splits on which this step can be predicted."""
        known = []
        for split in self._splits:
            bound = corun_bound(step, costs, split)
            if bound is not None:
                known.append((split, bound))
        if len(known) > 1:
            known.sort(key=lambda found: _training_rate(found[0], costs), reverse=True)
        return known

    def _may_spend(self, split: Split | None, bound: Bound, now: Situation) -> bool:
        room = now.slack_ms - bound.upper_ms - self._prompts.next_ms(now.tpot_ms)
        drain = max(0.0, self._token_ms[split] - now.tpot_ms)
        return self._spending[split].update(room, STEPS_IN_A_ROW * drain)


def _training_rate(split: Split | None, costs: Costs) -> float:
    """Measured tokens/s, or while that is unknown the share of the device, which is below every measured one."""
    rate = costs.training_rate(split)
    if math.isfinite(rate) or split is None:
        return rate
    return split.training
