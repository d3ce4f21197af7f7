"""Training beside serving, and prompts, whenever requests stay or come back ahead of their deadlines.

Requests bank what they gain on the promise (see `scheduling.slo`), and three rules say who may use it.

- *Hold prompts*: while a prompt is read, every answer under way stands still. It is read once these are far
  enough ahead, counting a share of what they will gain until they end, or once it has waited for as long as it
  may. While one waits, training goes on only where answers get ahead all the same, and soon enough; of several
  ways to do so, the one that costs training least for the time gained. Without training work prompts never wait.
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
from dataclasses import replace

from harli_appliance.scheduling.policies.candidates import Room, cheapest
from harli_appliance.scheduling.policies.corun_bound import corun_bound
from harli_appliance.scheduling.policies.hysteresis import Hysteresis
from harli_appliance.scheduling.policies.margin import MOST, Margin
from harli_appliance.scheduling.policies.policy import Policy, Situation, beside, pause
from harli_appliance.scheduling.policies.prompts import Prompts
from harli_appliance.scheduling.types import Admission, Bound, Costs, Decision, Outlook, Queue, Split, Step

COUNTED = 0.4
"""Share of what an answer gains until it ends that is counted on for prompts while no request misses; none of it
when many do."""
RESERVE_STEPS = 2.0
"""Decode steps that may take as long as their bound: so much slack is not spent."""
RESERVE_TOKENS = 4.0
"""Promised times per token that are not spent either, where a prompt takes as long: it would wait for them."""
STEPS_IN_A_ROW = 4
"""Steps slower than the promise that the slack must hold before the first of them."""
SOON = 0.5
"""Share of the time for which a prompt may still wait: where training goes on meanwhile, answers must be far
enough ahead by then."""


class Adaptive(Policy):
    """
    Args:
        splits: ways to divide the device; (None,) where there is only one.
        holds: whether prompts may be held back.
        elastic: see `Policy.elastic`.
    """

    def __init__(self, splits: Sequence[Split | None], *, holds: bool = True, elastic: bool = True) -> None:
        self._splits = splits
        self._several = [split for split in splits if split is not None]
        self.fuses = bool(self._several)
        self.elastic = elastic
        self._holds = holds
        self._held = False
        self._short_ms = self._patience_ms = 0.0
        self._decode: Bound | None = None
        self._reserve_ms = 0.0
        self._prompts = Prompts()
        self._margin = Margin()
        self._spending = {split: Hysteresis() for split in splits}

    def admits(self, queue: Queue | None, outlook: Outlook, costs: Costs) -> Admission:
        self._short_ms = self._patience_ms = 0.0
        # While nothing is trained, nothing of what is known here is kept up to date.
        if self._holds and outlook.ready and queue is not None and self._decode is not None:
            self._patience_ms = queue.patience_ms
            self._short_ms = self._short(queue, self._decode)
        self._held = self._short_ms > 0.0 and self._patience_ms > 0.0
        return "answers" if self._held else "all"

    def _short(self, queue: Queue, decode: Bound) -> float:
        """How much further ahead answers must be that can keep their promise, so that they can after the next
        prompt too; 0 when they are far enough."""
        needed = self._prompts.next_ms + decode.upper_ms
        counted = COUNTED * (1.0 - self._margin.value / MOST)
        short = 0.0
        for slack_ms, left, tpot_ms in queue.answering:
            ahead = slack_ms + counted * left * max(0.0, tpot_ms - decode.expected_ms)
            if ahead >= 0.0:
                short = max(short, needed - ahead)
        return short

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        solo = costs.solo(step)
        self._margin.see(now.ended, now.missed)
        held = self._held and step.kind == "decode"
        after_ms = 0.0
        if step.kind == "prefill":
            self._prompts.see(solo)
            after_ms = self._decode.upper_ms if self._decode is not None else 0.0
        elif solo is not None:
            self._decode = solo
            self._reserve_ms = RESERVE_STEPS * (solo.upper_ms - solo.expected_ms)
        slack_ms = now.slack_ms - after_ms
        pace_ms = now.tpot_ms * (1.0 - self._margin.value)
        reserve_ms = self._reserve_ms + min(RESERVE_TOKENS * now.tpot_ms, self._prompts.next_ms)
        spend_ms = slack_ms - reserve_ms
        if self._several and solo is not None:
            ahead = self._gets_ahead if held else None
            chosen = cheapest(step, solo, now, Room(pace_ms, spend_ms, slack_ms), self._several, costs, ahead)
            if chosen is not None:
                return _while_held(chosen) if held else chosen
        known = self._fastest_training_first(step, costs)
        if not known:
            return pause("no_prediction", solo)
        fitting = [(split, bound) for split, bound in known if bound.upper_ms <= slack_ms]
        if held:
            for split, bound in fitting:
                if self._gets_ahead(bound, now.tpot_ms):
                    return beside("corun_gets_ahead", bound, split)
            return pause("prompt_waits", solo)
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

    def _gets_ahead(self, bound: Bound, tpot_ms: float) -> bool:
        """Whether steps like that bring answers far enough ahead for the prompt that waits, and soon enough."""
        gain_ms = tpot_ms - bound.expected_ms
        return gain_ms > 0.0 and self._short_ms / gain_ms * bound.expected_ms <= SOON * self._patience_ms

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


def _while_held(decision: Decision) -> Decision:
    return replace(decision, reason="prompt_waits" if decision.mode == "pause" else "corun_gets_ahead")


def _training_rate(split: Split | None, costs: Costs) -> float:
    """Measured tokens/s, or while that is unknown the share of the device, which is below every measured one."""
    rate = costs.training_rate(split)
    if math.isfinite(rate) or split is None:
        return rate
    return split.training
