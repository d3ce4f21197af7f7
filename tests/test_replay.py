"""Synthetic traffic, the replay client, and the arithmetic of what it measured."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest

from harli_appliance.api.ports import ChatCall
from harli_appliance.api.wire import Usage
from harli_appliance.bench.replay import (
    Record,
    Slo,
    ask,
    compare_answers,
    percentiles,
    replay,
    summarise,
)
from harli_appliance.bench.workload import PlannedRequest, Traffic, bursty, for_seconds, recurring
from harli_appliance.client import HarliClient, StreamedText, StreamEnd
from harli_appliance.errors import EngineFault, Overloaded, UsageError
from tests.fakes import BASE, FakeAppliance, FakeGeneration, listening, words

SLO = Slo(tpot_ms=100, ttft_ms=1000)


# -- traffic ---------------------------------------------------------------------------------------


def first(count: int, seed: int = 1, traffic: Traffic | None = None) -> list[PlannedRequest]:
    return list(itertools.islice(bursty(seed, traffic or Traffic()), count))


def test_the_seed_decides_everything() -> None:
    assert first(50) == first(50)
    assert first(50) != first(50, seed=2)


def test_traffic_has_the_stated_load_and_lengths() -> None:
    requests = first(4000)
    at_s = np.array([request.at_s for request in requests])
    words_asked = np.array([len(request.prompt.split()) for request in requests])
    answers = np.array([request.answer_tokens for request in requests])
    assert (np.diff(at_s) > 0).all()
    # calm and burst alternate with mean stays cut at twice the mean: about 0.43 requests a second
    assert 0.35 < len(requests) / at_s[-1] < 0.5
    assert (answers.min(), answers.max()) == (16, 64)
    assert 26 <= np.median(answers) <= 30
    assert words_asked.min() >= 5
    assert words_asked.max() <= 60
    assert len({request.prompt for request in requests[:100]}) > 80


def test_traffic_is_burstier_than_a_poisson_process() -> None:
    at_s = np.array([request.at_s for request in first(4000)])
    counts = np.bincount((at_s / 10).astype(int))
    assert counts.var() / counts.mean() > 1.5  # 1 for Poisson
    steady = Traffic(calm_per_s=0.4, burst_per_s=0.4, swing=0)
    at_s = np.array([request.at_s for request in first(4000, traffic=steady)])
    counts = np.bincount((at_s / 10).astype(int))
    assert 0.8 < counts.var() / counts.mean() < 1.2


def test_traffic_recurs_with_other_questions_but_for_some() -> None:
    minute = first(5)
    requests = list(itertools.islice(recurring(minute, 60.0, 9, repeat_share=0.5), 40))
    assert [r.index for r in requests] == list(range(40))
    for number, request in enumerate(requests):
        original = minute[number % 5]
        assert request.at_s == pytest.approx(60.0 * (number // 5) + original.at_s)
        assert request.answer_tokens == original.answer_tokens
    again = [request for request in requests if request.prompt == minute[request.index % 5].prompt]
    assert 10 < len(again) < 30


def test_for_seconds_takes_the_beginning() -> None:
    taken = for_seconds(bursty(1), 30)
    assert taken == first(len(taken))
    assert taken[-1].at_s < 30 <= first(len(taken) + 1)[-1].at_s


@pytest.mark.parametrize("wrong", [{"calm_per_s": 0}, {"burst_s": -1}, {"swing": 1}])
def test_impossible_traffic_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="traffic"):
        Traffic(**wrong)


# -- replay ----------------------------------------------------------------------------------------


class ClockedClient(HarliClient):
    """Streams pieces at given moments; the request is sent at 0."""

    def __init__(self, pieces: list[tuple[float, str]], end: float, tokens: int) -> None:
        super().__init__("http://nowhere")
        self.pieces, self.end, self.tokens = pieces, end, tokens

    async def stream_chat(self, model, messages, **sampling):  # type: ignore[no-untyped-def]
        for at, text in self.pieces:
            yield StreamedText(text, at)
        usage = Usage(prompt_tokens=9, completion_tokens=self.tokens, total_tokens=9 + self.tokens)
        yield StreamEnd("length", usage, self.end)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harli_appliance.bench.replay.time.perf_counter", lambda: 0.0)


async def test_times_are_those_of_the_tokens(clock: None) -> None:
    client = ClockedClient([(0.5, "a"), (0.6, "b"), (0.9, "c")], end=0.9, tokens=3)
    record = await ask(client, BASE, PlannedRequest(4, 0, "hi", 3))
    assert record.error is None
    assert record.ttft_s == pytest.approx(0.5)
    assert record.tpot_s == pytest.approx(0.2)
    assert record.itl_s == pytest.approx((0.1, 0.3))
    assert (record.index, record.text, record.tokens, record.prompt_tokens) == (4, "abc", 3, 9)


async def test_tokens_without_text_still_count(clock: None) -> None:
    client = ClockedClient([(0.5, "a"), (0.7, "b")], end=0.8, tokens=4)
    record = await ask(client, BASE, PlannedRequest(0, 0, "hi", 4))
    assert record.tpot_s == pytest.approx(0.1)
    silent = await ask(ClockedClient([], end=0.8, tokens=1), BASE, PlannedRequest(0, 0, "hi", 1))
    assert silent.ttft_s == pytest.approx(0.8)
    assert silent.tpot_s is None
    assert silent.meets(SLO)


async def test_replay_asks_a_real_server_greedily_for_the_planned_length(tmp_path: Path) -> None:
    port = FakeAppliance(tmp_path)
    port.deltas = words("Hello", " there", finish="length")
    done: list[Record] = []
    requests = [PlannedRequest(0, 0.0, "first", 20), PlannedRequest(1, 0.02, "second", 30)]
    async with listening(port) as listener, HarliClient(listener.url) as client:
        records = await replay(client, BASE, requests, on_record=done.append)
    assert [record.text for record in records] == ["Hello there"] * 2
    assert [record.tokens for record in records] == [2, 2]
    assert sorted(record.index for record in done) == [0, 1]
    assert all(record.ttft_s is not None and record.ended_at >= record.sent_at for record in records)
    call = port.calls[1]
    assert (call.messages[0]["content"], call.max_tokens) == ("second", 30)
    assert (call.temperature, call.ignore_eos) == (0, True)


async def test_a_slow_answer_delays_no_later_request(tmp_path: Path) -> None:
    class OneByOne(FakeAppliance):
        async def chat(self, call: ChatCall) -> FakeGeneration:
            generation = await super().chat(call)
            if len(self.calls) < 3:
                await third.wait()  # the first two are answered only when the third one has arrived
            third.set()
            return generation

    third = asyncio.Event()
    requests = [PlannedRequest(index, index * 0.01, "hi", 4) for index in range(3)]
    async with listening(OneByOne(tmp_path)) as listener, HarliClient(listener.url) as client:
        records = await asyncio.wait_for(replay(client, BASE, requests), 10)
    assert [record.error for record in records] == [None] * 3


async def test_failures_are_told_in_the_record(tmp_path: Path) -> None:
    port = FakeAppliance(tmp_path)
    request = PlannedRequest(0, 0, "hi", 4)
    async with listening(port) as listener, HarliClient(listener.url) as client:
        port.refusal = Overloaded("the queue is full")
        refused = await ask(client, BASE, request)
        port.refusal, port.failure = None, EngineFault("the engine broke")
        broken = await ask(client, BASE, request)
        port.failure, port.hold_at = None, 1
        stuck = await ask(client, BASE, request, timeout_s=0.05)
    gone = await unreachable(request)
    assert refused.error == "the queue is full"
    assert refused.ttft_s is None
    assert broken.error is not None
    assert "the engine broke" in broken.error
    assert broken.tpot_s is None
    assert stuck.error == "no complete answer within 0.05 s"
    assert gone.error is not None
    assert not any(record.meets(SLO) for record in (refused, broken, stuck, gone))


async def unreachable(request: PlannedRequest) -> Record:
    async with HarliClient("http://127.0.0.1:1") as client:
        return await ask(client, BASE, request)


async def test_stop_ends_endless_traffic_and_finishes_what_is_under_way(tmp_path: Path) -> None:
    port = FakeAppliance(tmp_path)
    stop = asyncio.Event()
    seen: list[Record] = []

    def tell(record: Record) -> None:
        seen.append(record)
        if len(seen) == 3:
            stop.set()

    fast = Traffic(calm_per_s=100, burst_per_s=100)
    async with listening(port) as listener, HarliClient(listener.url) as client:
        records = await asyncio.wait_for(replay(client, BASE, bursty(1, fast), stop=stop, on_record=tell), 20)
    assert len(records) == len(port.calls) >= 3
    assert all(record.error is None for record in records)


# -- arithmetic ------------------------------------------------------------------------------------


def record(index: int = 0, **changes: object) -> Record:
    fields: dict[str, object] = {
        "index": index,
        "prompt": f"question {index}",
        "sent_at": 1000.0 + index,
        "ended_at": 1003.0 + index,
        "ttft_s": 0.5,
        "tpot_s": 0.05,
        "tokens": 10,
        "text": "abc",
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


def test_attainment_counts_both_targets_and_failures() -> None:
    records = [
        record(0),
        record(1, tpot_s=0.1),  # exactly on target is on target
        record(2, tpot_s=0.11),
        record(3, ttft_s=1.1),
        record(4, tpot_s=None, tokens=1),
        record(5, tpot_s=None, error="gone"),
    ]
    numbers = summarise(records, SLO)
    assert numbers["attainment"] == pytest.approx(3 / 6)
    assert (numbers["requests"], numbers["failed"]) == (6, 1)


def test_summary_percentiles_and_throughput() -> None:
    records = [record(i, tpot_s=(i + 1) / 1000, ttft_s=(i + 1) / 100, itl_s=(0.01, 0.03)) for i in range(101)]
    numbers = summarise(records, SLO)
    assert numbers["tpot_ms"] == {"p50": pytest.approx(51), "p99": pytest.approx(100)}
    assert numbers["ttft_ms"] == {"p50": pytest.approx(510), "p99": pytest.approx(1000)}
    assert numbers["itl_ms"]["p50"] == pytest.approx(20)
    assert numbers["output_tokens"] == 1010
    assert numbers["output_tokens_per_s"] == pytest.approx(1010 / 103, abs=0.001)
    assert numbers["percentile_method"] == "linear"


def test_nothing_measured_is_none_not_nan() -> None:
    assert percentiles([]) == {"p50": None, "p99": None}
    numbers = summarise([], SLO)
    assert numbers["attainment"] is None
    assert numbers["output_tokens_per_s"] is None


def test_answers_are_compared_by_prompt_and_length() -> None:
    alone = [record(0, text="one two", tokens=2), record(1, text="x"), record(2, text="y")]
    beside = [
        record(0, text="one two", tokens=2),
        record(0, text="one two three", tokens=3),  # longer: begins alike
        record(1, text="z"),  # differs
        record(2, text="", error="gone"),
        record(7, text="never asked before"),
    ]
    assert compare_answers(alone, beside) == (3, 1)
    assert compare_answers(alone, [record(0, text="one", tokens=2)]) == (1, 1)
