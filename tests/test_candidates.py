"""Choosing among splits, fused steps, slices and pausing: what costs training least, of what there is time for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

from harli_appliance.scheduling.policies import Situation, make_policy
from harli_appliance.scheduling.policies.candidates import MOST_UNITS, Room, cheapest
from harli_appliance.scheduling.types import Bound, Decision, Outlook, Split, Step

SMALL, HALF = Split("small", 0.25, 0.75), Split("half", 0.5, 0.5)
SPLITS = (SMALL, HALF)
DECODE, PROMPT = Step("decode", 8, 8000), Step("prefill", 1, 2000, 2000)
TPOT = 15.0
READY = Outlook(True, unit_ms=1.0, micro_batch_units=100)
NOW = Situation(DECODE, 100.0, TPOT, READY)
WIDE = Room(pace_ms=math.inf, spend_ms=0.0, slack_ms=100.0)


@dataclass
class Costs:
    """A step takes 8 ms alone, 9 beside training on half of the device, 14 on a quarter; bounds are 10% above."""

    whole: float = 10_000.0

    def solo(self, step: Step, split: Split | None = None) -> Bound | None:
        return Bound(8.0, 8.8)

    def corun(self, step: Step, split: Split | None = None) -> Bound | None:
        return Bound(9.0, 9.9) if split is HALF else Bound(14.0, 15.4)

    def fused(self, step: Step, tokens: int) -> Bound | None:
        return Bound(8.0 + tokens / 100, 8.8 + tokens / 100)

    def training_rate(self, split: Split | None = None) -> float:
        return self.whole if split is None else {"small": 7000.0, "half": 4500.0}[split.name]


def choose(room: Room = WIDE, now: Situation = NOW, splits: tuple[Split, ...] = SPLITS) -> Decision:
    assert now.step is not None
    solo = Costs().solo(now.step)
    assert solo is not None
    found = cheapest(now.step, solo, now, room, splits, Costs())
    assert found is not None
    return found


def pace(limit: float) -> Room:
    return replace(WIDE, pace_ms=limit)


def test_the_cheapest_step_that_there_is_time_for_is_taken() -> None:
    # Per step served, half costs 5500 x 9 ms = 49.5 tokens, small 3000 x 14 ms = 42, alone 80.
    assert choose(pace(14.0)).split is SMALL
    assert choose(pace(13.9)).split is HALF
    assert choose(pace(8.9)).mode == "pause"
    assert choose(replace(pace(14.5), slack_ms=15.3)).split is HALF, (
        "a bound beyond the tightest deadline is no choice"
    )
    banked = Room(pace_ms=0.0, spend_ms=9.8, slack_ms=100.0)
    long_units = replace(NOW, outlook=replace(READY, unit_ms=300.0))
    assert choose(banked, long_units).mode == "pause"
    assert choose(replace(banked, spend_ms=9.9), long_units).split is HALF


def test_forward_passes_ride_along_while_there_are_any() -> None:
    # 128 tokens take 9.28 ms and are 42.7 tokens' work: they cost 50.1. 256 take 10.56 and cost 20.3.
    forward = replace(NOW, outlook=replace(READY, fusible_tokens=300))
    found = choose(pace(13.9), forward)
    assert (found.mode, found.fused_tokens) == ("fused", 256)
    assert choose(pace(10.5), forward).fused_tokens == 192
    assert choose(pace(13.9), replace(NOW, outlook=replace(READY, fusible_tokens=63))).mode == "partition"


def test_time_that_was_banked_becomes_a_slice() -> None:
    # After a step on small, whose unit under way takes 1 / 0.7 ms to end.
    rich = Room(pace_ms=0.0, spend_ms=60.0, slack_ms=70.0)
    found = choose(rich)
    assert (found.mode, found.split, found.after) == (
        "partition",
        SMALL,
        int(60.0 + TPOT - 15.4 - 1 / 0.7 - 8.8),
    )
    assert choose(replace(rich, slack_ms=50.0)).after == int(50.0 + TPOT - 15.4 - 1 / 0.7 - 8.8), (
        "the next step is in time"
    )
    assert choose(replace(rich, spend_ms=1e6, slack_ms=1e6)).after == MOST_UNITS
    alone = choose(rich, splits=())
    assert (alone.mode, alone.units, alone.after) == ("time_slice", int(60.0 + TPOT - 2 * 8.8), 0)


def test_a_slice_leaves_time_for_what_is_cheapest_at_the_promised_pace() -> None:
    """Small lasts at 14 ms a token, but now its bound is beyond the tightest deadline."""
    now = replace(NOW, tpot_ms=16.0)
    assert choose(replace(pace(14.0), slack_ms=15.4), now).split is SMALL
    found = choose(replace(pace(14.0), slack_ms=15.3), now)
    assert (found.split, found.after) == (HALF, int(14.0 - 9.0 - 1 / 0.45))
    found = choose(replace(pace(14.0), slack_ms=12.0), now)
    assert (found.split, found.after) == (HALF, 0), "12 + 16 ms hold 9.9 now, 2.2 of a unit, and 15.4 then"


def test_what_costs_least_for_the_time_gained_is_chosen_where_answers_shall_get_ahead() -> None:
    def ahead(well_enough: bool) -> Decision | None:
        return cheapest(
            DECODE, Bound(8.0, 8.8), NOW, WIDE, SPLITS, Costs(), lambda bound, tpot_ms: well_enough
        )

    # Of 15 ms a token: half costs 49.5 tokens for 6 ms, small 42 for 1 ms, alone 80 for 7 ms.
    found = ahead(well_enough=True)
    assert found is not None
    assert (found.split, found.after) == (HALF, 0)
    found = ahead(well_enough=False)
    assert found is not None
    assert found.mode == "pause"


def test_prompts_run_alone_and_no_slice_follows_them() -> None:
    assert choose(now=replace(NOW, step=PROMPT)).mode == "pause"
    assert choose(Room(math.inf, 1e6, 1e6), replace(NOW, step=PROMPT)).mode == "pause"


def test_nothing_is_chosen_while_training_s_speed_is_unknown() -> None:
    assert cheapest(DECODE, Bound(8, 9), NOW, WIDE, SPLITS, Costs(whole=math.nan)) is None


@pytest.mark.parametrize("step", [DECODE, PROMPT])
def test_adaptive_chooses_so_where_there_are_several_splits(step: Step) -> None:
    policy = make_policy("adaptive", SPLITS)
    now = Situation(step, 100.0, 25.0, replace(READY, unit_ms=200.0))
    found = policy.decide(now, Costs())
    assert found.mode == ("pause" if step is PROMPT else "partition")
    assert found.split in (None, SMALL)
