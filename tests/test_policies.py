"""Policies: what each does when, and what none of them may ever do."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harli_appliance.bench import decide as decide_bench
from harli_appliance.errors import UsageError
from harli_appliance.scheduling.names import DEFAULT_POLICY, POLICY_NAMES, check_policy
from harli_appliance.scheduling.policies import Situation, make_policy
from harli_appliance.scheduling.policies.adaptive import STEPS_IN_A_ROW, Adaptive
from harli_appliance.scheduling.policies.hysteresis import Hysteresis
from harli_appliance.scheduling.policies.reserve import CHUNKS, RECENT, UNKNOWN_SHARE, Reserve
from harli_appliance.scheduling.types import Bound, Decision, Outlook, Split, Step

READY = Outlook(ready=True, unit_ms=20.0, micro_batch_units=9)
IDLE = Outlook(ready=False)
DECODE = Step("decode", 4, 400)
PREFILL = Step("prefill", 1, 200, 100)
TPOT = 100.0

OPEN_LOOP = {"naive", "train_only", *(name for name in POLICY_NAMES if ":" in name)}
"""Policies that by definition ask no prediction for leave."""


@dataclass
class KnownCosts:
    """Milliseconds for decode steps; a prefill step takes `prefill` times as long. None: unknown."""

    alone: float | None = 50.0
    beside: float | None = 80.0
    prefill: float = 2.0

    def _bound(self, step: Step, value: float | None) -> Bound | None:
        if value is None:
            return None
        factor = self.prefill if step.kind == "prefill" else 1.0
        return Bound(0.9 * factor * value, factor * value)

    def solo(self, step: Step, split: Split | None = None) -> Bound | None:
        return self._bound(step, self.alone)

    def corun(self, step: Step, split: Split | None = None) -> Bound | None:
        return self._bound(step, self.beside)

    def fused(self, step: Step, tokens: int) -> Bound | None:
        return None

    def training_rate(self, split: Split | None = None) -> float:
        return math.nan


KNOWN, UNKNOWN = KnownCosts(), KnownCosts(None, None)


def decide(
    policy: str, step: Step | None, slack: float, outlook: Outlook, costs: KnownCosts = KNOWN
) -> Decision:
    return make_policy(policy).decide(Situation(step, slack, TPOT, outlook), costs)


def test_every_name_makes_a_policy_and_others_list_the_known_ones() -> None:
    assert DEFAULT_POLICY == "adaptive"
    for name in POLICY_NAMES:
        assert check_policy(name) == name
        assert make_policy(name).decide(Situation(None, math.inf, TPOT, IDLE), KNOWN).mode == "idle"
    for name in ("best", "time_slice:65", "time_slice:", "Adaptive", ""):
        for refuse in (check_policy, make_policy):
            with pytest.raises(UsageError, match=", ".join(POLICY_NAMES)):
                refuse(name)


@pytest.mark.parametrize(
    ("policy", "step", "slack", "outlook", "mode"),
    [
        ("serve_only", DECODE, 1e6, READY, "pause"),
        ("serve_only", None, 1e6, READY, "idle"),
        ("train_only", DECODE, 1e6, READY, "training"),
        ("train_only", DECODE, 1e6, IDLE, "pause"),
        ("train_only", None, math.inf, IDLE, "idle"),
        ("time_slice", DECODE, 1e6, READY, "time_slice"),
        ("time_slice", DECODE, 100.0, READY, "pause"),
        ("time_slice", None, math.inf, READY, "training"),
        ("time_slice:64", DECODE, 1e6, READY, "pause"),
        ("time_slice:64", None, math.inf, READY, "training"),
        ("naive", DECODE, -1e6, READY, "partition"),
        ("naive", PREFILL, 1e6, IDLE, "pause"),
        ("naive", None, math.inf, READY, "training"),
        ("harli", DECODE, 1e6, READY, "partition"),
        ("harli", DECODE, -5.0, READY, "partition"),  # it looks at the step, not at what was banked
        ("harli", PREFILL, 1e6, READY, "pause"),
        ("harli", DECODE, 1e6, IDLE, "pause"),
        ("adaptive", DECODE, 1e6, READY, "partition"),
        ("adaptive", PREFILL, 1e6, READY, "partition"),
        ("adaptive", DECODE, 79.0, READY, "pause"),
        ("adaptive", DECODE, -5.0, READY, "pause"),
        ("adaptive", DECODE, 1e6, IDLE, "pause"),
        ("adaptive", None, math.inf, READY, "training"),
        ("adaptive", None, math.inf, IDLE, "idle"),
    ],
)
def test_what_each_policy_does(
    policy: str, step: Step | None, slack: float, outlook: Outlook, mode: str
) -> None:
    assert decide(policy, step, slack, outlook).mode == mode


steps = st.builds(
    Step,
    st.sampled_from(["prefill", "decode"]),
    st.integers(1, 64),
    st.integers(1, 50_000),
    st.integers(0, 512),
)
times = st.floats(0.1, 1e4)
situations = st.builds(
    Situation,
    st.none() | steps,
    st.floats(-1e5, 1e5) | st.just(math.inf),
    st.floats(1.0, 1e4),
    st.builds(Outlook, st.booleans(), times | st.just(math.nan), st.just(128), st.integers(0, 500)),
)
costs = st.builds(KnownCosts, st.none() | times, st.none() | times, st.floats(0.1, 20.0))


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(run=st.lists(st.tuples(situations, costs), max_size=8))
def test_a_decision_is_consistent(policy: str, run: list[tuple[Situation, KnownCosts]]) -> None:
    made = make_policy(policy)
    for now, known in run:
        decision = made.decide(now, known)
        trains = decision.mode in ("training", "time_slice", "partition")
        assert (decision.units > 0) == trains
        assert now.outlook.ready or not trains
        assert decision.serve == (decision.mode in ("pause", "time_slice", "partition"))
        assert now.step is not None or not decision.serve
        if decision.mode == "training":
            assert now.step is None or policy == "train_only"


@pytest.mark.parametrize("policy", sorted(set(POLICY_NAMES) - OPEN_LOOP))
@given(run=st.lists(situations, max_size=8), beside=st.none() | times)
def test_nothing_known_means_no_training_beside_requests(
    policy: str, run: list[Situation], beside: float | None
) -> None:
    made = make_policy(policy)
    for now in run:
        decision = made.decide(now, KnownCosts(None, beside))
        assert now.step is None or (decision.mode, decision.units) == ("pause", 0)


@given(run=st.lists(st.tuples(situations, costs), max_size=20))
def test_adaptive_never_spends_more_than_the_slack(run: list[tuple[Situation, KnownCosts]]) -> None:
    made = make_policy("adaptive")
    for now, known in run:
        decision = made.decide(now, known)
        if decision.mode == "partition":
            assert decision.bound is not None
            assert decision.bound.upper_ms <= now.slack_ms


@given(tpot=st.floats(60.0, 100.0), slack=st.floats(-1e5, 1e5))
def test_harli_never_starts_a_step_that_misses_the_target_by_itself(tpot: float, slack: float) -> None:
    decision = make_policy("harli").decide(Situation(DECODE, slack, tpot, READY), KNOWN)
    assert (decision.mode == "partition") == (tpot >= 80.0)


@pytest.mark.parametrize("slack", [300.0, 500.0, 900.0])
def test_time_slices_fill_the_slack_and_no_more(slack: float) -> None:
    units = decide("time_slice", DECODE, slack, READY).units
    assert units * READY.unit_ms + 2 * 50.0 <= slack < (units + 1) * READY.unit_ms + 2 * 50.0


@pytest.mark.parametrize("every", [64, 128, 512])
def test_a_turn_is_one_micro_batch_after_every_n_decode_steps(every: int) -> None:
    made = make_policy(f"time_slice:{every}")
    turns = []
    for tick in range(2 * every):
        made.decide(Situation(PREFILL, 1.0, TPOT, READY), KNOWN)  # not counted
        if (decision := made.decide(Situation(DECODE, 1.0, TPOT, READY), KNOWN)).mode == "time_slice":
            turns.append((tick + 1, decision.units))
    assert turns == [(every, 9), (2 * every, 9)]


def test_a_turn_waits_for_training_to_have_work() -> None:
    made = make_policy("time_slice:64")
    for _ in range(200):
        assert made.decide(Situation(DECODE, 1.0, TPOT, IDLE), KNOWN).mode == "pause"
    assert made.decide(Situation(DECODE, 1.0, TPOT, READY), KNOWN).mode == "time_slice"


def test_the_reserve_is_the_slowest_recent_prefill_step() -> None:
    reserve = Reserve()
    reserve.see(DECODE, KNOWN)
    reserve.see(PREFILL, UNKNOWN)
    assert reserve.ms(TPOT) == CHUNKS * UNKNOWN_SHARE * TPOT, "nothing is known yet"
    reserve.see(PREFILL, KnownCosts(prefill=7.0))
    for _ in range(RECENT - 1):
        reserve.see(PREFILL, KNOWN)
    assert reserve.ms(TPOT) == CHUNKS * 350.0
    reserve.see(PREFILL, KNOWN)
    assert reserve.ms(TPOT) == CHUNKS * 100.0, "the slow one is not recent any more"


def test_a_switch_opens_with_room_to_spare_and_closes_without() -> None:
    switch = Hysteresis()
    seen = [switch.update(room, 10.0) for room in (5, 0, -1, 5, 9.9, 10, 3, 0, -0.1, 9)]
    assert seen == [True, True, False, False, False, True, True, True, False, False]


def drained(beside: float, start: float) -> list[bool]:
    """Whether training ran beside each of 400 decode steps of one request, which gains and spends its slack."""
    made, known = Adaptive(), KnownCosts(50.0, beside)
    made.decide(Situation(PREFILL, 1e4, TPOT, READY), known)
    slack, ran = start, []
    for _ in range(400):
        ran.append(made.decide(Situation(DECODE, slack, TPOT, READY), known).mode == "partition")
        slack += TPOT - (beside if ran[-1] else 50.0)
        assert slack >= TPOT + CHUNKS * 100.0 or not ran[-1], "these chunks would push the request over"
    return ran


def test_adaptive_keeps_the_reserve_and_does_not_flap() -> None:
    ran = drained(130.0, start=TPOT)
    share = sum(ran) / len(ran)
    assert share == pytest.approx(50 / 80, abs=0.05), "what serving alone gains is what co-running may spend"
    switches = sum(a != b for a, b in pairwise(ran))
    assert switches <= 2 * len(ran) / STEPS_IN_A_ROW
    assert all(drained(90.0, start=300.0)), "a co-run that keeps the pace never has to stop"


def test_prompts_that_arrive_do_not_break_the_promise() -> None:
    """Requests of 60 tokens, one after the other; a prompt's chunk comes before every 20th token, at random."""
    rng, made, known = random.Random(3), Adaptive(), KnownCosts(50.0, 120.0, prefill=3.0)
    made.decide(Situation(PREFILL, 1e4, TPOT, READY), known)
    finished, missed, trained = 0, 0, 0
    slack, left = TPOT, 60
    while finished < 200:
        step = PREFILL if rng.random() < 0.05 else DECODE
        beside = made.decide(Situation(step, slack, TPOT, READY), known).mode == "partition"
        bound = known.corun(step) if beside else known.solo(step)
        assert bound is not None
        slack -= bound.upper_ms
        trained += beside
        if step is PREFILL:
            continue
        slack, left = slack + TPOT, left - 1
        if left == 0:
            finished, missed = finished + 1, missed + (slack < TPOT)
            slack, left = TPOT, 60
    assert missed <= 2
    assert trained > 0.4 * 60 * finished, "a reserve that stops training is no use"


def test_the_time_of_a_decision_is_reported_for_every_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decide_bench, "DECISIONS", 20)
    monkeypatch.setattr(decide_bench, "TAUGHT", 40)
    monkeypatch.setattr(decide_bench, "GOAL_US", 0.0)
    assert decide_bench.run(tmp_path, as_json=True) == 1, "nothing takes no time at all"
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "decide.json").read_text())
    assert set(report["policies"]) == set(POLICY_NAMES)
    assert all(0 < found["p50_us"] <= found["max_us"] for found in report["policies"].values())
