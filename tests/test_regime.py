"""A regime of latencies: its bound is exceeded as rarely as promised, and it follows a device that changes."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.regime import CAUTION, DRIFT, ENOUGH, Regime
from harli_appliance.scheduling.types import Split, Step

STEP = Step("decode", 4, 800)


def latency(features: tuple[float, ...], rng: random.Random, spread: float = 0.05) -> float:
    return (20.0 + 5.0 * features[1]) * rng.lognormvariate(0.0, spread)


def see(regime: Regime, features: tuple[float, ...], total: float) -> None:
    bound = regime.bound(features)
    if bound is not None:
        regime.judge(total, bound)
    regime.add(features, total)


def taught(samples: int = 400, seed: int = 0) -> tuple[Regime, random.Random]:
    rng, regime = random.Random(seed), Regime(0.99)
    for _ in range(samples):
        features = (1.0, float(rng.randrange(1, 17)))
        see(regime, features, latency(features, rng))
    return regime, rng


@pytest.mark.parametrize("outliers", [0.0, 0.004])
def test_the_share_of_steps_above_the_bound_is_the_promised_one(outliers: float) -> None:
    regime, rng = taught(100)
    above = 0
    for _ in range(6000):
        features = (1.0, float(rng.randrange(1, 17)))
        total = latency(features, rng) * (4.0 if rng.random() < outliers else 1.0)
        bound = regime.bound(features)
        assert bound is not None
        above += total > bound.upper_ms
        see(regime, features, total)
    assert 0.003 <= above / 6000 <= 0.02


def test_one_outlier_does_not_decide_the_bound_but_two_in_a_row_do() -> None:
    regime, rng = taught(1000)
    features = (1.0, 8.0)
    see(regime, features, 5 * latency(features, rng))
    first = regime.bound(features)
    assert first is not None
    assert first.upper_ms < 1.5 * first.expected_ms
    see(regime, features, 5 * latency(features, rng))
    see(regime, features, 5 * latency(features, rng))
    third = regime.bound(features)
    assert third is not None
    assert third.upper_ms > 3 * third.expected_ms


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_device_that_changes_is_followed_at_every_size_at_once(factor: float) -> None:
    regime, rng = taught()
    misses = 0
    for _ in range(DRIFT + 2):
        features = (1.0, 4.0)
        bound = regime.bound(features)
        assert bound is not None
        total = factor * latency(features, rng)
        misses += total > bound.upper_ms
        see(regime, features, total)
    assert misses <= 4, "the bound rises before the model does"
    elsewhere = regime.bound((1.0, 16.0))
    assert elsewhere is not None
    assert elsewhere.expected_ms == pytest.approx(factor * 100.0, rel=0.1)
    assert elsewhere.upper_ms < 1.5 * elsewhere.expected_ms, "what told of the change is not taken for noise"


def test_few_samples_are_trusted_less_than_many() -> None:
    few, _ = taught(ENOUGH)
    bound = few.bound((1.0, 4.0))
    assert bound is not None
    assert bound.upper_ms >= bound.expected_ms * (1 + CAUTION / ENOUGH)
    fewer, _ = taught(ENOUGH - 1)
    assert fewer.bound((1.0, 4.0)) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 64), st.floats(0.1, 1e4)), min_size=ENOUGH, max_size=80))
def test_whatever_it_learned_bounds_are_finite_and_above_what_is_expected(
    samples: list[tuple[float, float]],
) -> None:
    regime = Regime(0.99)
    for batch, total in samples:
        see(regime, (1.0, batch), total)
        bound = regime.bound((1.0, batch))
        if bound is not None:
            assert 0 < bound.expected_ms <= bound.upper_ms < math.inf


def test_restored_it_predicts_the_same() -> None:
    regime, _ = taught()
    state, restored = json.loads(json.dumps(regime.state())), Regime(0.99)
    restored.restore(state["samples"], state["residuals"])
    before, after = regime.bound((1.0, 8.0)), restored.bound((1.0, 8.0))
    assert before is not None
    assert after is not None
    assert after.expected_ms == pytest.approx(before.expected_ms, rel=0.02)
    assert after.upper_ms == pytest.approx(before.upper_ms, rel=0.05)


def test_each_split_and_each_amount_of_fused_tokens_is_learned_for_itself() -> None:
    predictor, wide, narrow = Predictor(), Split("96+36", 0.73, 0.27), Split("36+96", 0.27, 0.73)
    for _ in range(40):
        predictor.observe(STEP, 20.0, split=wide)
        predictor.observe(STEP, 60.0, split=narrow)
        predictor.observe(STEP, 26.0, corun=True, split=wide)
        predictor.observe(STEP, 15.0)
        predictor.observe(STEP, 25.0, fused_tokens=64)
        predictor.observe(STEP, 35.0, fused_tokens=128)
    expected = {
        "wide": predictor.solo(STEP, wide),
        "narrow": predictor.solo(STEP, narrow),
        "beside": predictor.corun(STEP, wide),
        "whole": predictor.solo(STEP),
        "fused": predictor.fused(STEP, 96),
    }
    found = {name: bound.expected_ms for name, bound in expected.items() if bound is not None}
    assert found == pytest.approx(
        {"wide": 20, "narrow": 60, "beside": 26, "whole": 15, "fused": 30}, rel=0.02
    )
    assert predictor.corun(STEP, narrow) is None
    assert predictor.corun(STEP) is None


def test_the_training_rate_is_an_average_for_each_split() -> None:
    predictor, split = Predictor(), Split("half", 0.5, 0.5)
    assert math.isnan(predictor.training_rate(split))
    for _ in range(200):
        predictor.observe_training(128.0, 2.0, split)
    assert predictor.training_rate(split) == pytest.approx(64.0)
    assert math.isnan(predictor.training_rate())


def test_sizes_that_cost_more_than_their_neighbours_are_learned() -> None:
    """As tiles do: three take as long as four."""
    predictor, rng = Predictor(), random.Random(5)
    for _ in range(400):
        batch = rng.randrange(1, 9)
        took = 20.0 * math.ceil(batch / 2) * rng.lognormvariate(0.0, 0.03)
        predictor.observe(Step("decode", batch, 100 * batch), took)
    for batch in range(1, 9):
        bound = predictor.solo(Step("decode", batch, 100 * batch))
        assert bound is not None
        assert bound.expected_ms == pytest.approx(20.0 * math.ceil(batch / 2), rel=0.1)
    unseen = predictor.solo(Step("decode", 12, 1200))
    assert unseen is not None
    assert unseen.expected_ms == pytest.approx(120.0, rel=0.15)


def test_a_machine_that_is_slow_for_a_while_is_slow_for_all_kinds_of_steps() -> None:
    predictor, prompt = Predictor(), Step("prefill", 1, 64, 64)
    for _ in range(64):
        predictor.observe(STEP, 50.0)
        predictor.observe(STEP, 60.0, corun=True)
        predictor.observe(prompt, 100.0)
    usual = predictor.solo(prompt)
    assert usual is not None
    for _ in range(6):
        predictor.observe(STEP, 90.0, corun=True)
    assert predictor.pace == pytest.approx(1.5, rel=0.03)
    slow = predictor.solo(prompt)
    assert slow is not None
    assert slow.expected_ms == pytest.approx(1.5 * usual.expected_ms, rel=0.03)
    for _ in range(8):
        predictor.observe(STEP, 50.0)
    assert predictor.pace == pytest.approx(1.0, abs=0.02)
    again = predictor.corun(STEP)
    assert again is not None
    assert again.expected_ms == pytest.approx(60.0, rel=0.02), "a burst is not what steps take"
    predictor.observe(STEP, 5000.0)
    assert predictor.pace < 1.3, "nor is one outlier"
    restored = Predictor()
    restored.restore(json.loads(json.dumps(predictor.state())))
    assert restored.pace == 1.0
