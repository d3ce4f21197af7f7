"""`harli bench predictor` and `harli bench adapt`: their arithmetic, their goals, and what they print."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from harli_appliance.bench import adapt, predictor_bench
from harli_appliance.bench.adapt_run import Slowdown
from harli_appliance.bench.compare_plan import ComparePlan, parse_slos
from harli_appliance.bench.predictor_errors import Observed, Recorder, errors, repeats
from harli_appliance.runtime.protocol import StepOutcome, StepPlan
from harli_appliance.scheduling.types import Split, Step

PLAN = ComparePlan(policies=("adaptive",), slos=parse_slos("2x"), model="m")


def steps(count: int, factor: float = 1.0, corun: bool = False, spread: float = 0.02) -> list[Observed]:
    """Decode steps of 40 ms and 5 more for each request, in a fixed pattern around that."""
    found = []
    for index in range(count):
        batch = 1 + index % 8
        noise = 1.0 + spread * ((index * 7) % 11 - 5) / 5
        took = factor * (1.25 if corun else 1.0) * (40.0 + 5.0 * batch) * noise
        found.append(Observed(Step("decode", batch, 100 * batch), took, corun, None, 0))
    return found


def both(count: int, factor: float = 1.0) -> list[Observed]:
    return steps(count, factor) + steps(count, factor, corun=True)


def test_errors_on_steps_like_those_learned_from() -> None:
    found = errors(both(300), both(200), 0.99)
    for way in ("frozen", "online"):
        assert set(found[way]["regimes"]) == {"decode, solo", "decode, co-run"}
        every = found[way]["all"]
        assert every["steps"] == every["predicted"] == 400
        assert 0.005 < every["median_error"] < 0.02  # the pattern's own spread
        assert every["above_bound"] <= 0.02
        assert 0.0 < every["median_margin"] < 0.05


def test_only_the_online_predictor_follows_a_device_that_changed() -> None:
    found = errors(steps(300), steps(200, factor=1.2), 0.99)
    assert found["frozen"]["all"]["median_error"] == pytest.approx(1 - 1 / 1.2, abs=0.02)
    assert found["frozen"]["all"]["above_bound"] > 0.9
    assert found["online"]["all"]["median_error"] < 0.03
    assert found["online"]["all"]["above_bound"] < 0.1


def test_what_was_never_learned_is_counted_but_not_judged() -> None:
    every = errors(steps(100), steps(5, corun=True), 0.99)["frozen"]["all"]
    assert (every["steps"], every["predicted"], every["median_error"]) == (5, 0, None)


def test_only_steps_that_the_predictor_cannot_tell_apart_are_repeats() -> None:
    step, other = Step("decode", 2, 100), Step("decode", 3, 100)
    took = [
        (step, 100.0, False),
        (step, 110.0, False),
        (step, 99.0, True),
        (step, 66.0, True),
        (other, 5.0, True),
    ]
    found = repeats([Observed(step, ms, corun, None, 0) for step, ms, corun in took])
    assert found == {"steps": 2, "median_change": round((10 / 110 + 0.5) / 2, 5)}
    prefill = Observed(Step("prefill", 1, 10, 10), 5.0, False, None, 0)
    assert repeats([prefill, prefill]) == {"steps": 0, "median_change": None}


def test_a_recorder_learns_and_keeps() -> None:
    recorder = Recorder()
    for observed in steps(40):
        observed.teach(recorder)
    assert recorder.seen == steps(40)
    bound = recorder.solo(Step("decode", 4, 400))
    assert bound is not None
    assert bound.expected_ms == pytest.approx(60.0, rel=0.05)


@pytest.mark.parametrize("split", [None, Split("1+1", 0.5, 0.5)])
def test_observed_steps_survive_a_file(split: Split | None) -> None:
    observed = Observed(Step("prefill", 2, 300, 64), 41.5, corun=True, split=split, fused_tokens=0)
    assert Observed.from_json(json.loads(json.dumps(observed.as_json()))) == observed
    assert observed.regime == "prefill, co-run" + (", 1+1" if split else "")


def shown(show: Any, report: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        show(report, console)
    return captured.get()


def test_the_predictors_goals() -> None:
    exact = predictor_bench.build_report(both(300), both(300), PLAN, "harli bench predictor")
    assert exact["goals"]["median_error"]["met"]
    drifted = predictor_bench.build_report(steps(300), steps(60, factor=3.0), PLAN, "harli bench predictor")
    assert not drifted["goals"]["above_bound"]["met"]
    assert "decode, co-run" in shown(predictor_bench.print_table, exact)
    assert "median relative error" in shown(predictor_bench.print_table, exact)


def tokens(gap_after_s: float) -> dict[str, Any]:
    """An answer of 20 tokens, 0.1 s each until the change at 1 s, then slower; 0.15 s are promised."""
    times = [0.1 * index for index in range(11)] + [1.0 + gap_after_s * index for index in range(1, 10)]
    return {
        "slo_tpot_ms": 150.0,
        "factor": 2.0,
        "changed_at": 1.0,
        "ended_at": 4.0,
        "modes": [[0.5, "partition"], [1.5, "pause"], [2.0, "pause"], [2.5, "pause"], [3.0, "partition"]],
        "answers": [times],
    }


def test_the_goal_of_adapting() -> None:
    slower = adapt.build_report(tokens(0.2), PLAN, "harli bench adapt")
    assert slower["violated_s"] == 0.0  # what was gained before pays for nine slower tokens
    assert slower["goals"]["violated_s"]["met"]
    assert slower["modes_before"] == {"partition": 1.0}
    assert slower["modes_after"] == {"pause": 0.75, "partition": 0.25}
    stuck = adapt.build_report(tokens(0.6), PLAN, "harli bench adapt")
    assert stuck["violated_before_s"] == 0.0
    assert stuck["violated_s"] > 2.0
    assert stuck["last_violation_s"] == pytest.approx(5.4)
    assert not stuck["goals"]["violated_s"]["met"]
    assert "missed" in shown(adapt.print_result, stuck)


def test_a_slowed_runtime_takes_longer_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    class Runtime:
        def execute(self, plan: StepPlan) -> StepOutcome:
            return StepOutcome(0.25, ())

    runtime: Any = Runtime()
    slowdown = Slowdown(runtime)
    assert runtime.execute(None).seconds == 0.25
    slowdown.factor = 3.0
    assert runtime.execute(None).seconds == 0.75
    assert slept == [0.0, 0.5]
