"""What the runs of a comparison amount to: the report's structure, its statistics, and who wins."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scipy import stats

from harli_appliance.bench.comparison import RunResult, SloTarget, build_report
from harli_appliance.bench.intervals import interval, share_interval

TARGET = SloTarget("1.5x", 100.0, 5000.0, 2.0)


def runs(
    policy: str, *rates: float, load: int = 60, good: int = 100, requests: int = 100, slo: str = "1.5x"
) -> list[RunResult]:
    """One run for each rate."""
    return [
        RunResult(
            policy,
            slo,
            load,
            repetition,
            requests,
            good,
            0,
            rate,
            (60.0, 80.0, 90.0),
            (200.0,),
            {"partition": 0.75, "pause": 0.25},
        )
        for repetition, rate in enumerate(rates)
    ]


def report(*results: RunResult, targets: tuple[SloTarget, ...] = (TARGET,)) -> dict[str, Any]:
    made = build_report(
        results,
        targets,
        trace={"name": "t"},
        machine={"cores": 2},
        simulated=False,
        command="harli bench run",
        context={"model": "m"},
    )
    return json.loads(json.dumps(made, allow_nan=False))  # type: ignore[no-any-return]


def verdict(*results: RunResult) -> dict[str, Any]:
    return report(*results)["verdicts"]["60"]  # type: ignore[no-any-return]


def test_the_report_has_the_published_structure() -> None:
    found = report(*runs("adaptive", 40, 50, 60), *runs("adaptive", 30, 30, load=90))
    cell = found["policies"]["adaptive"]["60"]
    assert set(found["policies"]["adaptive"]) == {"60", "90"}
    assert cell["attainment"] == 1.0
    assert cell["finetune_tokens_per_s"] == 50
    assert cell["finetune_tokens_per_s_ci"] == pytest.approx(stats.t.ppf(0.975, 2) * 10 / 3**0.5, abs=1e-3)
    assert cell["tpot_ms"]["p50"] == 80
    assert cell["ttft_ms"]["p99"] == 200
    assert cell["modes"] == {"partition": 0.75, "pause": 0.25}
    assert [run["finetune_tokens_per_s"] for run in cell["runs"]] == [40, 50, 60]
    assert found["slo"] == {"label": "1.5x", "tpot_ms": 100.0, "ttft_ms": 5000.0, "capacity_per_s": 2.0}
    assert (found["simulated"], found["model"], found["trace"], found["machine"]) == (
        False,
        "m",
        {"name": "t"},
        {"cores": 2},
    )


def test_each_slo_has_a_section_and_the_first_is_also_at_the_top() -> None:
    other = SloTarget("4x", 400.0, 5000.0, 3.0)
    found = report(*runs("adaptive", 10), *runs("adaptive", 90, slo="4x"), targets=(TARGET, other))
    assert found["policies"]["adaptive"]["60"]["finetune_tokens_per_s"] == 10
    assert found["slos"]["1.5x"]["policies"] == found["policies"]
    assert found["slos"]["4x"]["policies"]["adaptive"]["60"]["finetune_tokens_per_s"] == 90


def test_attainment_is_over_all_requests_with_wilsons_interval() -> None:
    both = [*runs("adaptive", 10, good=9, requests=10), *runs("adaptive", 10, good=30, requests=30)]
    assert report(*both)["policies"]["adaptive"]["60"]["attainment"] == 0.975
    low, high = share_interval(39, 40) or (0, 0)
    assert low == pytest.approx(0.8712, abs=1e-3)  # Wilson 1927, z = 1.96
    assert high == pytest.approx(0.9956, abs=1e-3)
    assert share_interval(0, 0) is None


def test_no_requests_is_no_attainment() -> None:
    cell = report(*runs("adaptive", 10, good=0, requests=0))["policies"]["adaptive"]["60"]
    assert cell["attainment"] is None
    assert cell["attainment_ci"] is None
    assert verdict(*runs("adaptive", 10, good=0, requests=0))["outcome"] == "breaks"


def test_one_run_has_no_confidence_interval() -> None:
    assert interval([3.0]) == (3.0, None)
    assert report(*runs("adaptive", 10))["policies"]["adaptive"]["60"]["finetune_tokens_per_s_ci"] is None


def test_the_fastest_rival_that_keeps_the_promise_is_the_one_that_counts() -> None:
    found = verdict(
        *runs("adaptive", 50, 51, 52),
        *runs("harli", 30, 31, 32),
        *runs("naive", 80, 80, 80, good=90),
        *runs("serve_only", 0, 0, 0),
    )
    assert (found["outcome"], found["rival"], found["difference"]) == ("wins", "harli", 20)


def test_repetitions_are_compared_in_pairs() -> None:
    # Between repetitions both vary by far more than they differ; within each, ours is always 2 faster.
    found = verdict(*runs("adaptive", 22, 52, 82.1), *runs("harli", 20, 50, 80))
    assert found["outcome"] == "wins"
    assert found["difference_ci"] < 0.2
    assert verdict(*runs("adaptive", 20, 50, 80), *runs("harli", 22, 52, 82.1))["outcome"] == "loses"
    assert verdict(*runs("adaptive", 20, 55, 80), *runs("harli", 22, 52, 82))["outcome"] == "ties"


def test_a_verdict_against_ours_says_how_long_training_waited() -> None:
    found = verdict(*runs("adaptive", 30, 31, 32), *runs("harli", 50, 51, 52))
    assert found["outcome"] == "loses"
    assert found["text"].endswith("training waited for 25% of the time, under harli for 25%")


def test_the_oracle_is_the_best_split_that_never_changes() -> None:
    found = report(
        *runs("static:a", 50, 50),
        *runs("static:b", 70, 70),
        *runs("static:c", 90, 90, good=90),
        *runs("harli", 80, 80),
        *runs("static:a", 20, 20, load=90, good=50),
        *runs("static:c", 10, 10, load=90, good=60),
    )
    assert found["oracle_static"] == {"60": "static:b", "90": "static:c"}


def test_variants_of_ours_are_no_rivals() -> None:
    found = verdict(*runs("adaptive", 50, 51), *runs("adaptive:something", 60, 61), *runs("harli", 40, 41))
    assert found["rival"] == "harli"


def test_a_broken_promise_names_what_the_machine_could_not_do() -> None:
    broken = runs("adaptive", 50, 50, good=97)
    found = verdict(*broken, *runs("serve_only", 0, 0))
    assert found["outcome"] == "breaks"
    assert found["text"] == "6 of 200 requests missed the promise of 100 ms"
    found = verdict(*broken, *runs("serve_only", 0, 0, good=98))
    assert "missed 4: the machine cannot keep it here" in found["text"]


def goals(*results: RunResult) -> dict[str, bool]:
    return {name: goal["met"] for name, goal in report(*results)["goals"].items()}


def test_goals() -> None:
    loads = [run for load in (30, 60, 90) for run in runs("adaptive", 50, 51, 52, load=load)]
    rivals = [*runs("time_slice", 30, 30, 30), *runs("time_slice:64", 90, 90, 90, good=50)]
    found = goals(*loads, *rivals)
    assert set(found) == {
        *(f"promise.1.5x.{load}" for load in (30, 60, 90)),
        *(f"fastest.1.5x.{load}" for load in (30, 60, 90)),
        "slicing.1.5x",
    }
    assert all(found.values())
    assert not goals(*loads, *runs("time_slice", 40, 40, 40))["slicing.1.5x"]
    assert not goals(*loads, *runs("harli", 60, 60, 60))["fastest.1.5x.60"]
    assert not goals(*runs("adaptive", 50, 51, good=98))["promise.1.5x.60"]
    assert goals(*runs("harli", 50)) == {}
