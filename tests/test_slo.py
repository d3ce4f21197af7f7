"""Deadlines: the heap against the plain definition, and steps counted for everybody against one by one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harli_appliance.scheduling.answer_lengths import RECENT, AnswerLengths
from harli_appliance.scheduling.deadlines import Deadlines
from harli_appliance.scheduling.slo import PATIENCE, RequestTiming, SloTracker, Target

NAMES = st.sampled_from("abcdefgh")
EVENTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "first", "decode", "end", "promise"]), NAMES, st.floats(0.001, 0.5)),
    max_size=60,
)


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["set", "discard", "put_off"]), NAMES, st.floats(0, 100)), max_size=300
    )
)
def test_the_earliest_deadline_is_the_earliest(moves: list[tuple[str, str, float]]) -> None:
    deadlines, known = Deadlines(0.5), dict[str, float]()
    for what, name, due in moves:
        if what == "set":
            deadlines.set(name, due)
            known[name] = due
        elif what == "discard":
            deadlines.discard(name)
            known.pop(name, None)
        else:
            deadlines.put_off()
            known = {name: due + 0.5 for name, due in known.items()}
        assert deadlines.earliest() == pytest.approx(min(known.values(), default=math.inf))


@given(events=EVENTS)
def test_a_round_is_a_token_for_every_running_request(events: list[tuple[str, str, float]]) -> None:
    together, single = SloTracker(100, 1000), SloTracker(100, 1000)
    now, arrived, first, tokens = 0.0, dict[str, float](), dict[str, float](), dict[str, int]()
    for what, name, gap in events:
        now += gap
        if what == "arrive" and name not in arrived:
            arrived[name] = now
            for slo in (together, single):
                slo.arrived(name, now)
        elif what == "first" and name in arrived and name not in first:
            first[name], tokens[name] = now, 1
            for slo in (together, single):
                slo.produced(name, 1, now)
        elif what == "decode":
            together.decoded(now)
            for running in tokens:
                tokens[running] += 1
                single.produced(running, 1, now)
        elif what == "end" and name in arrived:
            timings = [slo.ended(name, "finished") for slo in (together, single)]
            assert timings[0] == timings[1]
            for known in (arrived, first, tokens):
                known.pop(name, None)
        elif what == "promise":
            for slo in (together, single):
                slo.target = Target(1e3 * gap, 4e3 * gap)
        dues = [
            first[name] + tokens[name] * single.target.tpot_ms / 1e3
            if name in first
            else at + single.target.ttft_ms / 1e3
            for name, at in arrived.items()
        ]
        for slo in (together, single):
            assert slo.slack_ms(now) == pytest.approx(1e3 * (min(dues, default=math.inf) - now), abs=1e-6)
    assert together.attainment == single.attainment


def test_each_class_has_deadlines_of_its_own() -> None:
    slo = SloTracker(100, 1000, {"interactive": Target(50, 500), "batch": Target(1000, 9000)})
    assert slo.tightest_tpot_ms == 100, "nobody is served"
    slo.arrived("b", 0.0, "batch")
    assert (slo.slack_ms(0.0), slo.tightest_tpot_ms) == (9000, 1000)
    slo.arrived("i", 0.0, "interactive")
    assert (slo.slack_ms(0.0), slo.tightest_tpot_ms) == (500, 50)
    for request in "bi":
        slo.produced(request, 1, 0.1)
    assert slo.slack_ms(0.1) == pytest.approx(50)
    slo.decoded(0.2)
    assert slo.slack_ms(0.2) == pytest.approx(0)
    assert slo.ended("i", "finished") == RequestTiming(pytest.approx(100), pytest.approx(100), 2, met=False)
    assert (slo.slack_ms(0.2), slo.tightest_tpot_ms) == (pytest.approx(1900), 1000)
    slo.ended("b", "finished")
    kept = {name: ledger.attainment.share for name, ledger in slo.classes.items()}
    assert kept == {"standard": None, "interactive": 0.0, "batch": 1.0}
    assert slo.attainment == 0.5
    with pytest.raises(KeyError):
        SloTracker(100, 1000).arrived("r", 0.0, "batch")


def test_a_new_promise_to_the_standard_class_leaves_the_others_alone() -> None:
    slo = SloTracker(100, 1000, {"interactive": Target(50, 500)})
    slo.arrived("i", 0.0, "interactive")
    slo.arrived("s", 0.0)
    slo.target = Target(10, 200)
    assert slo.slack_ms(0.0) == 200
    slo.ended("s", "aborted")
    assert slo.slack_ms(0.0) == 500


def test_the_queue_tells_who_waits_and_what_answers_have_left() -> None:
    slo = SloTracker(100, 1000, {"batch": Target(200, 9000)})
    for index, tokens in enumerate((5, 20, 20, 30)):  # answers that ended
        slo.arrived(f"old-{index}", 0.0)
        slo.produced(f"old-{index}", tokens, 0.0)
        slo.ended(f"old-{index}", "finished")
    slo.arrived("a", 0.0)
    slo.arrived("b", 0.0, "batch")
    slo.produced("a", 1, 0.5)
    slo.produced("b", 10, 0.5)
    slo.decoded(0.6)
    assert slo.queue(0.6) is None, "nobody waits for a first token"
    slo.arrived("late", 0.7)
    slo.arrived("later", 0.8, "batch")
    found = slo.queue(0.8)
    assert found is not None
    assert found.patience_ms == pytest.approx(1e3 * (0.7 + PATIENCE * 1.0 - 0.8))
    slack, left, tpot = zip(*found.answering, strict=True)
    assert slack == pytest.approx((500 + 2 * 100 - 800, 500 + 11 * 200 - 800))
    assert left == (5 - 2, 20 - 11)
    assert tpot == (100, 200)
    slo.ended("late", "aborted")
    found = slo.queue(0.8)
    assert found is not None
    assert found.patience_ms == pytest.approx(1e3 * PATIENCE * 9.0)


def test_answers_are_taken_to_be_as_long_as_nearly_all_that_got_so_far() -> None:
    lengths = AnswerLengths()
    assert lengths.left(3) == 0, "nothing is known"
    for tokens in range(1, 101):
        lengths.add(tokens)
    assert lengths.left(0) == 6
    assert lengths.left(50) == 3
    assert lengths.left(99) == 1
    assert lengths.left(100) == 0
    for _ in range(RECENT):
        lengths.add(7)
    assert (lengths.left(2), lengths.left(7)) == (5, 0), "old ones are forgotten"
