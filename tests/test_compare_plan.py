"""What is asked of a comparison: promises, loads, order, stretches of a trace; the ladder; the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harli_appliance.bench.compare_ladder import CLOSE, Promise, capacity, climb
from harli_appliance.bench.compare_plan import (
    ComparePlan,
    Run,
    SloAsked,
    parse_loads,
    parse_milliseconds,
    parse_policies,
    parse_replay,
    parse_slos,
    stretch,
    without_folders,
)
from harli_appliance.bench.compare_store import CompareStore, Moment, Request, RunFile, Rung
from harli_appliance.bench.comparison import RunResult
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.config import load_settings
from harli_appliance.errors import ConfigError, UsageError
from harli_appliance.scheduling.names import POLICY_NAMES


def a_plan(**changes: object) -> ComparePlan:
    plan = ComparePlan(
        policies=("adaptive", "naive", "serve_only"), slos=(SloAsked(label="2x", factor=2.0),), model="m"
    )
    return plan.model_copy(update=changes)


# -- what a person writes --------------------------------------------------------------------------


def test_promises_are_times_or_multiples() -> None:
    first, second, third = parse_slos("40ms, 1.5x,2s")
    assert (first.label, first.resolve(30.0)) == ("40ms", 40.0)
    assert (second.label, second.resolve(30.0)) == ("1.5x", 45.0)
    assert (third.label, third.resolve(30.0)) == ("2s", 2000.0)


@pytest.mark.parametrize("text", ["40", "fast", "", "0x", "-1x", "1.5x,", "40ms,40ms"])
def test_no_promise(text: str) -> None:
    with pytest.raises(UsageError, match="slo-tpot"):
        parse_slos(text)


def test_loads_are_shares_kept_as_percents() -> None:
    assert parse_loads("0.9,0.3,0.6") == (30, 60, 90)
    for text in ("", "0", "-1", "30", "nan", "0.3,0.3", "x"):
        with pytest.raises(UsageError, match="loads"):
            parse_loads(text)


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    assert parse_policies("naive, adaptive") == ("naive", "adaptive")
    with pytest.raises(UsageError) as caught:
        parse_policies("adaptive,magic")
    assert "'magic'" in caught.value.message
    assert all(name in caught.value.message for name in POLICY_NAMES)
    with pytest.raises(UsageError, match="twice"):
        parse_policies("naive,naive")
    with pytest.raises(UsageError, match="names none"):
        parse_policies(" ")


def test_other_words() -> None:
    assert parse_milliseconds("slo-ttft", "5s") == 5000
    assert parse_replay("http") == "http"
    for wrong in (lambda: parse_milliseconds("slo-ttft", "5x"), lambda: parse_replay("ftp")):
        with pytest.raises(UsageError, match=r"--(slo-ttft|replay)"):
            wrong()


def test_a_reports_command_names_no_folder_of_this_machine() -> None:
    command = "harli bench run --trace '/a/my traces/t.csv' --out=/tmp/x/out --slo-tpot 1.5x,2x --loads 0.3"
    shown = "harli bench run --trace t.csv --out=out --slo-tpot 1.5x,2x --loads 0.3"
    assert without_folders(command) == shown


# -- runs --------------------------------------------------------------------------------------------


def test_every_run_is_made_once_and_the_order_rotates() -> None:
    plan = a_plan(slos=(SloAsked(label="2x", factor=2.0), SloAsked(label="9ms", tpot_ms=9.0)))
    runs = list(plan.runs())
    assert len(runs) == len(set(runs)) == len({run.file for run in runs}) == 3 * 2 * 3 * 3
    firsts = [runs[index].policy for index in range(0, len(runs), 3)]
    assert firsts[:4] == ["adaptive", "naive", "serve_only", "adaptive"]
    for start in range(0, len(runs), 3):  # policies of a load follow each other
        assert len({(run.slo, run.load, run.repetition) for run in runs[start : start + 3]}) == 1


def even_trace(seconds: int = 1000, per_s: int = 5) -> Trace:
    requests = tuple(TraceRequest(i / per_s, 10 + i % 50, 5 + i % 20) for i in range(seconds * per_s))
    return Trace("even", requests, float(seconds))


def test_a_stretch_has_the_asked_rate_and_lower_rates_are_parts_of_higher_ones() -> None:
    plan = a_plan(seconds=36.0, lead_s=4.0)
    low, high = (stretch(even_trace(), plan, rate, 1) for rate in (0.5, 2.0))
    assert (len(low), len(high)) == (20, 80)
    assert set(low.requests) < set(high.requests)
    assert low.duration_s == 40.0
    assert stretch(even_trace(), plan, 0.5, 1) == low
    assert stretch(even_trace(), plan, 0.5, 0).requests != low.requests
    assert len(stretch(even_trace(), plan, 8.0, 0)) == 320  # more than the trace has: copies


def test_the_longest_answer_that_keeps_its_promise_is_in_time() -> None:
    plan = ComparePlan(policies=("adaptive",), slos=(), model="m", max_output_tokens=500, ttft_ms=2000.0)
    assert plan.grace_of(1.0) == plan.grace_s
    assert plan.grace_of(40.0) == pytest.approx(2 + 500 * 0.04)


def test_a_trace_shorter_than_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,4\n2023-11-16 18:15:50,5,4\n"
    )
    with pytest.raises(UsageError, match="4 s long, a run takes 40 s"):
        a_plan(trace=file).load_trace()


def test_a_bad_row_is_named_or_left_out(tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:{15 + i // 6}:{10 * (i % 6):02}.5,{5 if i != 7 else 'x'},4" for i in range(30)]
    file = tmp_path / "t.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    with pytest.raises(UsageError, match=r"row 9: 'x' is no number of prompt tokens.*--skip-bad"):
        a_plan(trace=file).load_trace()
    assert a_plan(trace=file, skip_bad=True).load_trace().skipped == 1


# -- the ladder ----------------------------------------------------------------------------------------


async def found(promises: list[Promise], first: float) -> tuple[list[Rung], list[float]]:
    """A machine whose p99 TPOT is 50 ms + 100 ms for each request per second."""
    tried: list[float] = []

    async def attempt(rate: float) -> Rung:
        tried.append(rate)
        tpot = 50.0 + 100.0 * rate
        return Rung(rate, 20, tpot, 10.0, {p.label: float(tpot <= p.tpot_ms) for p in promises})

    return await climb(promises, first, 12, attempt), tried


@pytest.mark.parametrize("first", [0.3, 1.0, 4.0])
async def test_the_capacity_lies_where_the_promise_breaks(first: float) -> None:
    promises = [Promise("a", 150.0), Promise("b", 250.0)]
    rungs, tried = await found(promises, first)
    assert capacity(promises[0], rungs) == pytest.approx(1.0)
    assert capacity(promises[1], rungs) == pytest.approx(2.0)
    assert [rung.rate_per_s for rung in rungs] == sorted(set(tried))
    assert len(rungs) <= 12
    around = [rate for rate in tried if rate > 1.0][:1] + [rate for rate in tried if rate <= 1.0]
    assert around


async def test_no_capacity_when_every_rate_breaks_the_promise() -> None:
    promise = Promise("tight", 40.0)
    rungs, tried = await found([promise], 1.0)
    assert capacity(promise, rungs) is None
    assert min(tried) >= 1.0 / 8


async def test_the_ladder_ends_when_it_is_close() -> None:
    rungs, _ = await found([Promise("a", 150.0)], 1.0)
    kept = max(rung.rate_per_s for rung in rungs if rung.attainment["a"] == 1.0)
    broken = min(rung.rate_per_s for rung in rungs if rung.attainment["a"] == 0.0)
    assert broken / kept <= CLOSE


async def test_a_rate_that_a_disturbance_broke_is_tried_again() -> None:
    disturbed = {1.0}

    async def attempt(rate: float) -> Rung:
        tpot = 50.0 + 100.0 * rate
        kept = tpot <= 250.0 and rate not in disturbed
        disturbed.discard(rate)
        return Rung(rate, 20, tpot, 10.0, {"a": float(kept)})

    promise = Promise("a", 250.0)
    assert capacity(promise, await climb([promise], 1.0, 12, attempt)) == pytest.approx(2.0, rel=CLOSE - 1.0)


def test_a_rung_that_breaks_for_its_first_tokens_gives_no_interpolation() -> None:
    rungs = [Rung(1.0, 20, 60.0, 10.0, {"a": 1.0}), Rung(1.2, 20, 70.0, 9e3, {"a": 0.5})]
    assert capacity(Promise("a", 100.0), rungs) == 1.0


# -- the folder ----------------------------------------------------------------------------------------


def a_run_file() -> RunFile:
    result = RunResult("naive", "2x", 60, 1, 2, 1, 0, 12.5, (50.0, 90.0), (100.0, 110.0), {"pause": 1.0})
    request = Request(4.5, 12, 8, 100.0, 50.0, 0.6, met=True, counts=True, error=None)
    return RunFile(result, [request], [Moment(4.25, "pause", 1, 50.0, 5, 0, 0, 100)])


def test_runs_are_kept_as_they_are(tmp_path: Path) -> None:
    store = CompareStore(tmp_path)
    store.begin(a_plan(), resume=False)
    run = Run("2x", 60, 1, "naive")
    assert not store.has(run)
    assert store.read(run) is None
    store.keep(run, a_run_file())
    assert store.has(run)
    assert store.read(run) == a_run_file()
    assert store.plan() == a_plan()


def test_a_folder_is_not_written_over_and_resumes_the_same_comparison_only(tmp_path: Path) -> None:
    CompareStore(tmp_path).begin(a_plan(), resume=False)
    with pytest.raises(UsageError, match="--resume goes on with it"):
        CompareStore(tmp_path).begin(a_plan(), resume=False)
    with pytest.raises(UsageError, match="another seconds, seed"):
        CompareStore(tmp_path).begin(a_plan(seconds=9.0, seed=1), resume=True)
    more = a_plan(policies=("adaptive", "naive", "harli"))
    CompareStore(tmp_path).begin(more, resume=True)
    assert CompareStore(tmp_path).plan() == more
    with pytest.raises(UsageError, match="another repetitions"):  # with other parts of the trace
        CompareStore(tmp_path).begin(a_plan(repetitions=4), resume=True)
    with pytest.raises(UsageError, match="leave --resume out"):
        CompareStore(tmp_path / "other").begin(a_plan(), resume=True)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = CompareStore(tmp_path)
    store.begin(a_plan(), resume=False)
    (tmp_path / "basis.json").write_text('{"half')
    with pytest.raises(ConfigError, match=r"basis\.json: is damaged"):
        store.basis()


# -- prompts -------------------------------------------------------------------------------------------


def test_prompts_have_exact_lengths(tiny_model: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    trace = Trace("t", (TraceRequest(0.0, 40, 7), TraceRequest(1.0, 3, 2), TraceRequest(2.0, 90, 2)), 3.0)
    planned = Prompts(tiny_model).plan(trace, 4, "a")
    # The first word has no space before it, which may cost a token.
    lengths = [len(tokenizer.encode(" " + request.prompt).ids) for request in planned]
    assert lengths == [36, 1, 86]
    assert [request.answer_tokens for request in planned] == [7, 2, 2]
    other = Prompts(tiny_model).plan(trace, 4, "b")
    assert [request.at_s for request in other] == [request.at_s for request in planned]
    assert other[0].prompt != planned[0].prompt


def test_shared_prefixes_are_shared_within_a_replay_only(tiny_model: Path) -> None:
    shared = (TraceRequest(0.0, 20, 2, (1, 2)), TraceRequest(1.0, 20, 2, (1, 3)))
    trace = Trace("t", shared, 2.0, block_tokens=8)
    first, second = Prompts(tiny_model).plan(trace, 0, "7 replay 1")
    words = [first.prompt.split(), second.prompt.split()]
    assert words[0][:8] == words[1][:8]
    assert words[0][8:16] != words[1][8:16]
    assert Prompts(tiny_model).plan(trace, 0, "7 replay 2")[0].prompt.split()[:8] != words[0][:8]


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})
    )
    with pytest.raises(ConfigError, match="too few words"):
        Prompts(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        Prompts(tmp_path / "none")


def test_the_appliance_that_is_measured_has_what_the_machine_needs(tmp_path: Path) -> None:
    plan = a_plan(sequence_tokens=64)
    usual = plan.appliance_settings(tmp_path, load_settings())
    assert usual == {
        "model": {"path": str(tmp_path), "served_name": tmp_path.name},
        "training": {"sequence_tokens": 64},
    }
    device = {"attention": "triton", "graphs": False}
    settings = load_settings(device=device, memory={"pool_slots": 4096}, server={"port": 1})
    asked = plan.appliance_settings(tmp_path, settings)
    assert asked == usual | {"device": device, "memory": {"pool_slots": 4096}}
