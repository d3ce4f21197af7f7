"""Traces: the published formats as they are written, bad rows by number, and what scaling does to bursts."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.bench.traces_read import load_trace
from harli_appliance.bench.traces_synthetic import Bursts, Lengths, synthetic_trace
from harli_appliance.errors import UsageError

START = datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC).timestamp()

lengths = st.integers(1, 200_000)
milliseconds = st.integers(0, 10_000_000)
rows = st.lists(st.tuples(milliseconds, lengths, lengths), min_size=1, max_size=30).map(sorted)
on_disk = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def azure(path: Path, table: list[tuple[int, int, int]], *, zone: bool) -> None:
    """As published: seven digits in 2023; six, or none when they are zero, and a zone in 2024."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n" if zone else "\n")
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for ms, prompt, output in table:
            moment = datetime.fromtimestamp(START + ms / 1e3, UTC)
            stamp = moment.isoformat(sep=" ") if zone else moment.strftime("%Y-%m-%d %H:%M:%S.%f0")
            writer.writerow([stamp, prompt, output])


def burstgpt(path: Path, table: list[tuple[int, int, int]], *, sessions: bool) -> None:
    """With and without the columns that later releases added in between."""
    extra = ["Session ID", "Elapsed time"] if sessions else []
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["Timestamp", *extra, "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"]
        )
        for ms, prompt, output in table:
            more = ["a,b", "3.5"] if sessions else []
            writer.writerow([ms / 1e3, *more, "GPT-4", prompt, output, prompt + output, "API log"])


def mooncake(path: Path, table: list[tuple[int, int, int]]) -> None:
    with path.open("w") as file:
        for ms, prompt, output in table:
            blocks = list(range(math.ceil(prompt / 512)))
            row = {"timestamp": ms, "input_length": prompt, "output_length": output, "hash_ids": blocks}
            file.write(json.dumps(row) + "\n")


WRITERS = {
    "azure 2023": lambda path, table: azure(path, table, zone=False),
    "azure 2024": lambda path, table: azure(path, table, zone=True),
    "burstgpt 1": lambda path, table: burstgpt(path, table, sessions=False),
    "burstgpt 3": lambda path, table: burstgpt(path, table, sessions=True),
    "mooncake": mooncake,
}


@pytest.mark.parametrize("form", WRITERS)
@given(table=rows)
@on_disk
def test_what_was_written_is_read(form: str, table: list[tuple[int, int, int]], tmp_path: Path) -> None:
    path = tmp_path / "trace"
    WRITERS[form](path, table)
    trace = load_trace(path)
    first = table[0][0]
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(p, o) for _, p, o in table]
    assert [r.at_s for r in trace.requests] == pytest.approx(
        [(ms - first) / 1e3 for ms, _, _ in table], abs=2e-6
    )
    assert trace.skipped == 0
    assert all(
        len(r.prefix) == (math.ceil(r.prompt_tokens / 512) if form == "mooncake" else 0)
        for r in trace.requests
    )


def test_rows_out_of_order_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    burstgpt(path, [(5000, 1, 1), (1000, 2, 2), (9000, 3, 3)], sessions=False)
    assert [(r.at_s, r.prompt_tokens) for r in load_trace(path).requests] == [(0.0, 2), (4.0, 1), (8.0, 3)]


BAD_CSV = {
    "2023-11-16 18:15:50,12,x": "'x' is no number of response tokens",
    "2023-11-16 18:15:50,,5": "'' is no number of prompt tokens",
    "2023-11-16 18:15:50,1.5,5": "'1.5' is no number of prompt tokens",
    "2023-11-16 18:15:50,12,0": "0 response tokens",
    "2023-11-16 18:15:50,-3,5": "-3 prompt tokens",
    "yesterday,12,5": "TIMESTAMP 'yesterday' is no date",
    "2023-11-16 18:15:50,12": "has 2 of 3 columns",
}


@pytest.mark.parametrize("line", BAD_CSV)
def test_a_bad_csv_row_is_named_or_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    good = "2023-11-16 18:15:4{},10,20\n"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + good.format(6) + line + "\n" + good.format(7)
    )
    with pytest.raises(UsageError) as caught:
        load_trace(path)
    assert f"{path}, row 3: {BAD_CSV[line]}" in caught.value.message
    assert "--skip-bad" in caught.value.message
    trace = load_trace(path, skip_bad=True)
    assert (len(trace), trace.skipped) == (2, 1)


BAD_JSON = {
    "{not json}": "is no JSON",
    "[1]": "is no JSON object",
    '{"input_length": 5, "output_length": 5}': "has no timestamp",
    '{"timestamp": "5", "input_length": 5, "output_length": 5}': 'timestamp is "5", not a number',
    '{"timestamp": NaN, "input_length": 5, "output_length": 5}': "timestamp is NaN, not a number",
    '{"timestamp": 5, "input_length": 2.5, "output_length": 5}': "input_length is 2.5, not a whole number",
    '{"timestamp": 5, "input_length": true, "output_length": 5}': "input_length is true, not a number",
    '{"timestamp": 5, "input_length": 5, "output_length": 0}': "0 response tokens",
    '{"timestamp": 5, "input_length": 5, "output_length": 5, "hash_ids": ["a"]}': "hash_ids must be",
}


@pytest.mark.parametrize("line", BAD_JSON)
def test_a_bad_json_row_is_named_or_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = '{"timestamp": 0, "input_length": 5, "output_length": 5}\n'
    path.write_text(good + "\n" + line + "\n")
    with pytest.raises(UsageError) as caught:
        load_trace(path)
    assert f"{path}, row 3: {BAD_JSON[line]}" in caught.value.message
    assert load_trace(path, skip_bad=True).skipped == 1


@given(text=st.text(max_size=200))
@on_disk
def test_no_file_of_any_content_does_worse_than_a_usage_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"no usable rows|no trace known|row|no text file"):
        load_trace(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no usable rows"),
        (b"a,b,c\n1,2,3\n", "starts with 'a,b,c', which is no trace known here: Azure"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no usable rows"),
        (b"\xff\xfe\x00", "is no text file"),
    ],
)
def test_a_file_that_is_no_trace(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_trace(path)
    assert reason in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_trace(tmp_path / "none.csv")


# -- changing a trace --------------------------------------------------------------------------------


def bursty() -> Trace:
    """A strongly modulated trace: its bursts stand out from the noise of counting."""
    return synthetic_trace(2000.0, 3, Bursts(rate_per_s=6.0, variation=1.0, interval_s=10.0))


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.7, 3.0])
def test_another_rate_keeps_the_bursts_where_they_are(factor: float) -> None:
    trace = bursty()
    scaled = trace.with_rate_factor(factor, seed=5)
    assert scaled.rate_per_s == pytest.approx(factor * trace.rate_per_s, rel=0.05)
    assert scaled.count_dispersion(10.0) == pytest.approx(trace.count_dispersion(10.0), rel=0.15)
    counts = [
        np.histogram([r.at_s for r in t.requests], bins=200, range=(0, 2000))[0] for t in (trace, scaled)
    ]
    assert np.corrcoef(*counts)[0, 1] > 0.95
    # A stretched trace has the same rate, but its bursts are elsewhere and last longer.
    stretched = trace.stretched(1 / factor)
    assert stretched.rate_per_s == pytest.approx(factor * trace.rate_per_s)
    assert stretched.duration_s == pytest.approx(2000.0 / factor)


def test_scaling_is_seeded_and_a_factor_of_one_changes_nothing() -> None:
    trace = bursty()
    assert trace.with_rate_factor(1.0, seed=1) == trace
    for factor in (0.4, 2.5):
        assert trace.with_rate_factor(factor, seed=1) == trace.with_rate_factor(factor, seed=1)
        assert trace.with_rate_factor(factor, seed=1) != trace.with_rate_factor(factor, seed=2)
    assert trace.at_rate(2.0, seed=1).rate_per_s == pytest.approx(2.0, rel=0.05)


@given(factor=st.floats(0.05, 4.0), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_scaled_requests_stay_in_order_and_in_the_trace(factor: float, seed: int) -> None:
    trace = synthetic_trace(100.0, 1)
    times = [request.at_s for request in trace.with_rate_factor(factor, seed).requests]
    assert times == sorted(times)
    assert not times or (times[0] >= 0 and times[-1] <= trace.duration_s)


def test_copies_share_prefixes_among_themselves_only() -> None:
    shared = tuple(TraceRequest(10.0 + i, 1024, 8, (0, i + 1)) for i in range(3))
    twice = Trace("t", shared, 20.0).with_rate_factor(2.0, seed=1)
    originals = {request.prefix for request in shared}
    copies = [request.prefix for request in twice.requests if request.prefix not in originals]
    assert len(copies) == 3
    assert len({prefix[0] for prefix in copies}) == 1
    assert not {block for prefix in copies for block in prefix} & {0, 1, 2, 3}


def test_a_window_starts_at_zero_and_may_not_be_empty() -> None:
    trace = Trace("t", tuple(TraceRequest(float(s), 5, 5) for s in (0, 10, 20, 30)), 30.0)
    window = trace.window(10.0, 20.0)
    assert [request.at_s for request in window.requests] == [0.0, 10.0]
    assert window.rate_per_s == pytest.approx(0.1)
    with pytest.raises(
        UsageError, match=r"t: no request arrives between 40 and 50 s; the trace is 30 s long"
    ):
        trace.window(40.0, 10.0)


def test_lengths_are_scaled_then_capped_and_prefixes_follow() -> None:
    trace = Trace("t", (TraceRequest(0.0, 1200, 300, (7, 8, 9)), TraceRequest(1.0, 2, 1)), 1.0)
    scaled = trace.with_lengths(
        prompt_scale=0.25, output_scale=0.5, max_prompt_tokens=200, max_output_tokens=64
    )
    assert scaled.block_tokens == 128
    assert scaled.requests[0] == TraceRequest(0.0, 200, 64, (7, 8))
    assert scaled.requests[1] == TraceRequest(1.0, 1, 1)
    floored = trace.with_lengths(output_scale=0.1, min_output_tokens=16, max_output_tokens=64)
    assert [request.output_tokens for request in floored.requests] == [30, 16]
    with pytest.raises(UsageError, match="at least 65 tokens cannot be cut to 64"):
        trace.with_lengths(min_output_tokens=65, max_output_tokens=64)


def test_the_synthetic_trace_is_seeded_bursty_and_shaped_as_asked() -> None:
    assert synthetic_trace(100.0, 4) == synthetic_trace(100.0, 4)
    assert synthetic_trace(100.0, 4) != synthetic_trace(100.0, 5)
    calm = synthetic_trace(4000.0, 2, Bursts(rate_per_s=5.0, variation=0.0))
    wild = synthetic_trace(4000.0, 2, Bursts(rate_per_s=5.0, variation=1.0))
    assert calm.count_dispersion(5.0) == pytest.approx(1 / math.sqrt(25), rel=0.1)
    assert wild.count_dispersion(5.0) == pytest.approx(math.sqrt(1 + 1 / 25), rel=0.15)
    assert wild.rate_per_s == pytest.approx(5.0, rel=0.1)
    prompts = [request.prompt_tokens for request in calm.requests]
    outputs = [request.output_tokens for request in calm.requests]
    assert float(np.median(prompts)) == pytest.approx(1020, rel=0.05)
    assert float(np.median(outputs)) == pytest.approx(129, rel=0.05)
    short = synthetic_trace(100.0, 2, Bursts(5.0), Lengths(prompt_cap=50, output_cap=9))
    assert max(r.prompt_tokens for r in short.requests) == 50
    assert max(r.output_tokens for r in short.requests) == 9


@pytest.mark.parametrize("change", [{"rate_per_s": 0.0}, {"variation": -1.0}, {"interval_s": 0.0}])
def test_impossible_bursts_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(Bursts(), **change)


@pytest.mark.parametrize(
    "row",
    ['{"timestamp": 1' + "0" * 400 + ', "input_length": 5, "output_length": 5}', "[" * 100_000],
    ids=["huge", "deep"],
)
def test_a_row_that_python_cannot_read_is_a_bad_row(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.jsonl"
    good = '{"timestamp": 0, "input_length": 5, "output_length": 5}'
    path.write_text(f"{good}\n{row}\n")
    with pytest.raises(UsageError, match="row 2: "):
        load_trace(path)
    assert len(load_trace(path, skip_bad=True)) == 1
