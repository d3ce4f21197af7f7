"""Training beside serving, and prompts, whenever requests stay or come back ahead of their deadlines.

Requests bank what they gain on the promise (see `scheduling.slo`), and three rules say who may use it.

- *Hold prompts*: while a prompt is read, every answer under way stands still. It is read once these are far
  enough ahead, counting a share of what they will gain until they end, or once it has waited for as long as it
  may. While one waits, nothing else is spent. Without training work prompts never wait.
- *Keep pace*: a decode step may have training beside it that is expected to take at most the promised time, less a
  margin. Slack then grows all the time, so none has to be there at first. The promise is a mean over many tokens,
  which is why it is compared with the expected step and not with its bound. The margin follows the requests that
  missed.
- *Spend slack*: what is banked beyond a small reserve may be spent on steps that are slower than that. Once it was
  spent, there must be room for a few such steps before it begins again.

Whatever runs, the step's bound must fit the tightest deadline. Among the splits of the device that a rule allows,
the one on which training is fastest is taken; the last rule goes first, since it allows faster ones.
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
from harli_appliance.scheduling.types import Admission, Bound, Costs, Decision, Outlook, Queue, Split, Step

COUNTED = 0.5
"""Share of what an answer gains until it ends that is counted on for prompts while no request misses; none of it
when many do."""
RESERVE_STEPS = 2.0
"""Decode steps that may take as long as their bound: so much slack is not spent."""
RESERVE_TOKENS = 4.0
"""Promised times per token that are not spent either, where a prompt takes as long: it would wait for them."""
STEPS_IN_A_ROW = 4
"""Steps slower than the promise that the slack must hold before the first of them."""


class Adaptive(Policy):
    """
    Args:
        splits: ways to divide the device; (None,) where there is only one.
        holds: whether prompts may be held back.
    """

    def __init__(self, splits: Sequence[Split | None], *, holds: bool = True) -> None:
        self._splits = splits
        self._several = [split for split in splits if split is not None]
        self.fuses = bool(self._several)
        self._holds = holds
        self._held = False
        self._decode: Bound | None = None
        self._reserve_ms = 0.0
        self._prompts = Prompts()
        self._margin = Margin()
        self._spending = {split: Hysteresis() for split in splits}

    def admits(self, queue: Queue | None, outlook: Outlook, costs: Costs) -> Admission:
        self._held = (
            self._holds
            and outlook.ready  # while nothing is trained, nothing of what is known here is kept up to date
            and queue is not None
            and self._decode is not None
            and queue.patience_ms > 0.0
            and self._too_close(queue, self._decode)
        )
        return "answers" if self._held else "all"

    def _too_close(self, queue: Queue, decode: Bound) -> bool:
        """Whether an answer that can keep its promise would not after the next prompt."""
        needed = self._prompts.next_ms + decode.upper_ms
        counted = COUNTED * (1.0 - self._margin.value / MOST)
        for slack_ms, left, tpot_ms in queue.answering:
            ahead = slack_ms + counted * left * max(0.0, tpot_ms - decode.expected_ms)
            if 0.0 <= ahead < needed:
                return True
        return False

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        solo = costs.solo(step)
        self._margin.see(now.ended, now.missed)
        after_ms = 0.0
        if step.kind == "prefill":
            self._prompts.see(solo)
            after_ms = self._decode.upper_ms if self._decode is not None else 0.0
        elif solo is not None:
            self._decode = solo
            self._reserve_ms = RESERVE_STEPS * (solo.upper_ms - solo.expected_ms)
            if self._held:
                return pause("prompt_waits", solo)
        slack_ms = now.slack_ms - after_ms
        pace_ms = now.tpot_ms * (1.0 - self._margin.value)
        reserve_ms = self._reserve_ms + min(RESERVE_TOKENS * now.tpot_ms, self._prompts.next_ms)
        spend_ms = slack_ms - reserve_ms
        if self._several and solo is not None:
            chosen = cheapest(step, solo, now, Room(pace_ms, spend_ms, slack_ms), self._several, costs)
            if chosen is not None:
                return chosen
        known = self._fastest_training_first(step, costs)
        if not known:
            return pause("no_prediction", solo)
        fitting = [(split, bound) for split, bound in known if bound.upper_ms <= slack_ms]
        if not fitting:
            return pause("corun_too_slow", solo)
        for split, bound in fitting:
            slower_ms = STEPS_IN_A_ROW * max(0.0, bound.expected_ms - now.tpot_ms)
            if self._spending[split].update(spend_ms - bound.upper_ms, slower_ms):
                return beside("corun_spends_slack", bound, split)
        for split, bound in fitting:
            if bound.expected_ms <= pace_ms:
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


def _training_rate(split: Split | None, costs: Costs) -> float:
    """Measured tokens/s, or while that is unknown the share of the device, which is below every measured one."""
    rate = costs.training_rate(split)
    if math.isfinite(rate) or split is None:
        return rate
    return split.training
