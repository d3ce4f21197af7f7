"""Predictor and deadlines: bounds that hold, and care where nothing is known."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.regime import ENOUGH
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.scheduling.types import Outlook, Step

READY = Outlook(ready=True, unit_ms=20.0)
IDLE = Outlook(ready=False)


def truth(step: Step, corun: bool, rng: random.Random) -> float:
    alone = 40 + 6 * step.batch + 0.01 * step.context_tokens + 1.5 * step.prefill_tokens
    slowdown = 8 + 1.0 * step.batch if corun else 0.0
    return (alone + slowdown) * rng.uniform(0.95, 1.08)


def a_step(rng: random.Random) -> Step:
    batch = rng.randrange(1, 16)
    if rng.random() < 0.2:
        return Step("prefill", 1, 200, rng.randrange(16, 128))
    return Step("decode", batch, batch * rng.randrange(20, 600))


def taught(samples: int = 600, seed: int = 0) -> Predictor:
    rng, predictor = random.Random(seed), Predictor()
    for index in range(samples):
        step, corun = a_step(rng), index % 2 == 1
        predictor.observe(step, truth(step, corun, rng), corun=corun)
    return predictor


def test_it_learns_both_stages_and_its_bound_holds() -> None:
    predictor, rng = taught(), random.Random(99)
    errors, above = [], 0
    for index in range(1000):
        step, corun = a_step(rng), index % 2 == 1
        bound = predictor.corun(step) if corun else predictor.solo(step)
        assert bound is not None
        actual = truth(step, corun, rng)
        errors.append(abs(bound.expected_ms - actual) / actual)
        above += actual > bound.upper_ms
    assert sorted(errors)[500] < 0.05
    assert above <= 20, "a bound of 99% may be exceeded by some 1% of steps"


def test_a_slowdown_is_never_negative() -> None:
    predictor = taught()
    for batch in range(1, 20):
        step = Step("decode", batch, 100 * batch)
        solo, corun = predictor.solo(step), predictor.corun(step)
        assert solo is not None
        assert corun is not None
        assert corun.expected_ms >= solo.expected_ms


def test_too_few_samples_predict_nothing() -> None:
    predictor = Predictor()
    for _ in range(ENOUGH - 1):
        predictor.observe(Step("decode", 1, 50), 50.0, corun=False)
    assert predictor.solo(Step("decode", 1, 50)) is None
    assert predictor.corun(Step("decode", 1, 50)) is None


@given(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -5.0]))
def test_what_cannot_be_a_time_teaches_nothing(value: float) -> None:
    predictor = Predictor()
    predictor.observe(Step("decode", 1, 50), value, corun=False)
    assert predictor.samples == 0


def test_its_state_survives_json() -> None:
    predictor, restored = taught(), Predictor()
    assert restored.restore(json.loads(json.dumps(predictor.state(), allow_nan=False)))
    step = Step("decode", 5, 900)
    first, second = predictor.corun(step), restored.corun(step)
    assert first is not None
    assert second is not None
    assert second.upper_ms == pytest.approx(first.upper_ms, rel=0.05)
    stranger = Predictor()
    assert not stranger.restore({"version": 999, "regimes": {}}), "it is of no use, so there is none"
    assert stranger.samples == 0


def test_it_adapts_when_the_device_becomes_slower() -> None:
    predictor, rng = taught(), random.Random(5)
    for _ in range(600):
        step = Step("decode", 4, 800)
        predictor.observe(step, 2 * truth(step, False, rng), corun=False)
    bound = predictor.solo(Step("decode", 4, 800))
    assert bound is not None
    assert bound.expected_ms == pytest.approx(2 * (40 + 24 + 8), rel=0.1)


def test_only_train_only_keeps_requests_waiting() -> None:
    scheduler = Scheduler(Predictor(), "adaptive")
    assert scheduler.admits(None, READY) == "all"
    scheduler.use("train_only")
    assert scheduler.admits(None, READY) == "none"
    assert scheduler.admits(None, IDLE) == "all"


def test_a_request_banks_what_it_gained() -> None:
    slo = SloTracker(tpot_ms=100, ttft_ms=1000)
    slo.arrived("r", 0.0)
    assert slo.slack_ms(0.2) == pytest.approx(800)
    assert slo.produced("r", 1, 0.5) is None
    assert slo.slack_ms(0.5) == pytest.approx(100)
    assert slo.produced("r", 1, 0.54) == pytest.approx(40)
    assert slo.slack_ms(0.54) == pytest.approx(160)
    slo.arrived("late", 0.0)
    slo.produced("late", 1, 0.1)
    assert slo.slack_ms(0.54) == pytest.approx(-340), "the tightest deadline counts"
    slo.ended("late", "finished")
    slo.ended("r", "finished")
    assert slo.slack_ms(0.6) == math.inf


def test_attainment_counts_failures_but_not_those_who_left() -> None:
    slo = SloTracker(tpot_ms=100, ttft_ms=1000)
    for name, gap, how in (
        ("good", 0.05, "finished"),
        ("slow", 0.2, "finished"),
        ("left", 0.2, "aborted"),
        ("broken", 0.01, "failed"),
    ):
        slo.arrived(name, 0.0)
        for token in range(5):
            slo.produced(name, 1, 0.1 + token * gap)
        timing = slo.ended(name, how)  # type: ignore[arg-type]
        assert timing is not None
        assert timing.tpot_ms == pytest.approx(1e3 * gap)
    assert slo.attainment == pytest.approx(1 / 3)
    assert (slo.requests, slo.failed) == (4, 1)
    assert slo.ended("unknown", "finished") is None
