"""A whole comparison on a made-up system in virtual time: the basis, every run, the report, resuming."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harli_appliance.api.wire import Usage
from harli_appliance.bench.compare_ladder import Promise
from harli_appliance.bench.compare_plan import ComparePlan, SloAsked
from harli_appliance.bench.compare_report import print_summary, read_results, write_results
from harli_appliance.bench.compare_run import CompareRun
from harli_appliance.bench.compare_store import CompareStore
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.session import LIGHT_ANSWERS
from harli_appliance.bench.training_load import EXAMPLES, write_lesson
from harli_appliance.client import StreamedText, StreamEnd
from harli_appliance.errors import ConfigError, JobFailed, UsageError
from harli_appliance.schema import JobView, PolicyChange, Status, Timeline
from tests.fakes import make_sample, make_status
from tests.virtual_time import START, run_in_virtual_time

FIRST_S, STEP_S, PER_REQUEST_S = 0.05, 0.05, 0.005
TRAINED_PER_S = {"serve_only": 0, "train_only": 100, "adaptive": 60, "naive": 80}
SLOWDOWN = {"naive": 4.0}
OVERHEAD = 5


@dataclass
class Named:
    id: str


@dataclass
class MadeUpSystem:
    """Serves each token in 50 ms and 5 more for each request in service; trains at a rate of its policy."""

    policy: str = "adaptive"
    running: int = 0
    trained: float = 0.0
    since: float = 0.0
    job_fails: bool = False
    jobs: list[JobView] = field(default_factory=list)
    changes: list[PolicyChange] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    samples: int = 0
    lesson: str = ""
    slower: Callable[[MadeUpSystem], float] = lambda _: 1.0

    async def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any
    ) -> AsyncIterator[StreamedText | StreamEnd]:
        self.prompts.append(messages[0]["content"])
        count = sampling["max_tokens"]
        self.running += 1
        try:
            if self.policy == "train_only":
                await asyncio.sleep(1e4)
            await asyncio.sleep(FIRST_S)
            for token in range(count):
                if token:
                    step = STEP_S + PER_REQUEST_S * self.running
                    await asyncio.sleep(step * SLOWDOWN.get(self.policy, 1.0) * self.slower(self))
                yield StreamedText("x ", time.perf_counter())
        finally:
            self.running -= 1
        words = len(messages[0]["content"].split()) + OVERHEAD
        usage = Usage(prompt_tokens=words, completion_tokens=count, total_tokens=words + count)
        yield StreamEnd("length", usage, time.perf_counter())

    def _train(self) -> None:
        now = time.perf_counter()
        if self.jobs:
            self.trained += TRAINED_PER_S[self.policy] * (now - self.since)
        self.since = now

    async def status(self) -> Status:
        self._train()
        base = make_status()
        return base.model_copy(
            update={
                "policy": self.policy,
                "jobs": self.jobs,
                "serving": base.serving.model_copy(update={"running": self.running, "waiting": 0}),
                "training": base.training.model_copy(update={"tokens": int(self.trained)}),
            }
        )

    async def timeline(self, since: int = 0) -> Timeline:
        while self.samples * 0.25 < time.time() - START:
            self.samples += 1
        found = [make_sample(seq, t=START + 0.25 * seq) for seq in range(since, self.samples)]
        return Timeline(samples=found, next=self.samples)

    async def change_policy(self, change: PolicyChange) -> Status:
        self._train()
        self.changes.append(change)
        self.policy = change.policy or self.policy
        return await self.status()

    async def upload(self, path: Path) -> Named:
        self.lesson = path.read_text()
        return Named("file-1")

    async def create_job(self, model: str, training_file: str, *, n_epochs: int, batch_size: int) -> Named:
        assert training_file == "file-1"
        status = "failed" if self.job_fails else "running"
        job = JobView(id=f"ftjob-{len(self.jobs)}", status=status, model=model, total_steps=100, created_at=1)
        self.jobs = [job, *self.jobs]
        return Named(job.id)


PLAN = ComparePlan(
    policies=("adaptive", "naive", "serve_only"),
    slos=(SloAsked(label="2x", factor=2.0), SloAsked(label="90ms", tpot_ms=90.0)),
    model="tiny",
    loads=(20, 40),
    repetitions=2,
    seconds=12.0,
    lead_s=2.0,
    max_prompt_tokens=40,
    min_output_tokens=2,
    max_output_tokens=20,
)


@pytest.fixture
def prompts(tiny_model: Path) -> Prompts:
    return Prompts(tiny_model)


def compare(
    plan: ComparePlan,
    folder: Path,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    system: MadeUpSystem | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    store = CompareStore(folder)
    store.begin(plan, resume=resume)
    trace = plan.load_trace()
    told: list[str] = []

    def tell(title: str, share: float | None, note: str) -> None:
        told.append(title)

    run = CompareRun(system or MadeUpSystem(), "tiny", plan, trace, prompts, store, tell)
    run_in_virtual_time(run.measure(), monkeypatch)
    assert told[-1] == "Runs"
    return read_results(store, plan, trace, "harli bench run")[0]


def test_a_comparison(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compare(PLAN, tmp_path, prompts, monkeypatch)
    assert report["simulated"] is False
    assert report["light_tpot_ms"] == pytest.approx(55.0)
    assert report["train_alone_tokens_per_s"] == pytest.approx(100, rel=0.01)
    assert report["slo"]["tpot_ms"] == pytest.approx(110.0)
    assert set(report["slos"]) == {"2x", "90ms"}
    # A token takes 50 + 5 n ms: a looser promise allows more requests in service.
    assert report["slos"]["2x"]["slo"]["capacity_per_s"] > report["slos"]["90ms"]["slo"]["capacity_per_s"]
    for section in report["slos"].values():
        assert set(section["policies"]) == set(PLAN.policies)
        for policy, cells in section["policies"].items():
            assert set(cells) == {"20", "40"}
            for cell in cells.values():
                assert cell["finetune_tokens_per_s"] == pytest.approx(TRAINED_PER_S[policy], rel=0.05)
                assert len(cell["runs"]) == 2
                assert cell["requests"] > 2
                assert cell["attainment"] == (0.0 if policy == "naive" else 1.0)
                assert cell["modes"] == {"partition": 1.0}
        assert {v["outcome"] for v in section["verdicts"].values()} == {"wins"}
        assert {v["rival"] for v in section["verdicts"].values()} == {"serve_only"}


def test_the_capacity_holds_in_every_part_of_the_trace(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = {
        "slos": PLAN.slos[:1],
        "loads": (90,),
        "repetitions": 3,
        "policies": ("serve_only",),
        "variation": 1.5,
    }
    report = compare(PLAN.model_copy(update=busy), tmp_path, prompts, monkeypatch)
    found = report["policies"]["serve_only"]["90"]["runs"]
    assert [run["attainment"] for run in found] == [1.0, 1.0, 1.0]
    # In one of the other parts the rate that the first part allows would be too much.
    assert report["slo"]["capacity_per_s"] < max(
        rung["rate_per_s"] for rung in report["ladder"] if rung["attainment"]["2x"] == 1.0
    )


def test_all_policies_get_the_same_requests_with_other_words(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = MadeUpSystem()
    plan = PLAN.model_copy(
        update={"policies": ("adaptive", "serve_only"), "slos": PLAN.slos[:1], "loads": (40,)}
    )
    compare(plan, tmp_path, prompts, monkeypatch, system)
    store = CompareStore(tmp_path)
    shapes: dict[int, set[tuple[tuple[float, int, int], ...]]] = {}
    for run in plan.runs():
        kept = store.read(run)
        assert kept is not None
        shape = tuple((r.at_s, r.prompt_tokens, r.tokens) for r in kept.requests)
        shapes.setdefault(run.repetition, set()).add(shape)
    assert [len(found) for found in shapes.values()] == [1, 1]
    assert shapes[0] != shapes[1]
    long = [prompt for prompt in system.prompts if len(prompt.split()) > 4]
    assert len(set(long)) == len(long) > 50


def test_the_lead_does_not_count(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLAN.model_copy(update={"slos": PLAN.slos[:1]})
    compare(plan, tmp_path, prompts, monkeypatch)
    kept = [CompareStore(tmp_path).read(run) for run in plan.runs()]
    for found in kept:
        assert found is not None
        assert [request.counts for request in found.requests] == [r.at_s >= 2.0 for r in found.requests]
        assert found.result.requests == sum(request.counts for request in found.requests)
    assert any(not request.counts for found in kept if found for request in found.requests)


def test_files_hold_every_run_request_and_moment(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = PLAN.model_copy(update={"loads": (40,)})
    compare(plan, tmp_path, prompts, monkeypatch)
    report = write_results(CompareStore(tmp_path), plan, plan.load_trace(), "harli bench run")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    rows = {
        name: list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        for name in ("runs", "requests", "timeline")
    }
    assert len(rows["runs"]) == 2 * 2 * 3
    counted = sum(
        cell["requests"]
        for s in report["slos"].values()
        for p in s["policies"].values()
        for cell in p.values()
    )
    assert sum(row["counts"] == "True" for row in rows["requests"]) == counted
    assert {row["mode"] for row in rows["timeline"]} == {"partition"}
    page = (tmp_path / "report.html").read_text()
    for expected in ("What is compared", "adaptive wins", "90ms", "How it was measured", "harli bench run"):
        assert expected in page
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 2 * 3 + 2 + 1
    assert "All promises together" in page
    for picture in pictures:
        ElementTree.fromstring(  # noqa: S314 - our own
            "<svg" + picture.split("</svg>")[0] + "</svg>"
        )
    print_summary(report)
    assert "adaptive wins" in capsys.readouterr().out


def test_it_goes_on_where_it_was(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLAN.model_copy(update={"slos": PLAN.slos[:1], "policies": ("naive", "serve_only")})
    compare(plan, tmp_path, prompts, monkeypatch)
    gone = [run for run in plan.runs() if run.repetition == 1 and run.policy == "naive"]
    for run in gone:
        (tmp_path / "runs" / run.file).unlink()
    basis = (tmp_path / "basis.json").read_text()
    system = MadeUpSystem()
    more = plan.model_copy(update={"policies": PLAN.policies})
    compare(more, tmp_path, prompts, monkeypatch, system, resume=True)
    assert (tmp_path / "basis.json").read_text() == basis
    promised = [change.policy for change in system.changes if (change.slo_tpot_ms or 0) < 1e6]
    assert sorted(filter(None, promised)) == ["adaptive"] * 4 + ["naive"] * 2


ONE_POLICY = PLAN.model_copy(
    update={"slos": PLAN.slos[:1], "policies": ("adaptive",), "loads": (40,), "repetitions": 2}
)


def promised(system: MadeUpSystem) -> int:
    """Runs that have begun."""
    return sum((change.slo_tpot_ms or 0) < 1e6 for change in system.changes)


def test_the_clock_goes_with_the_machine(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes half as long again from the first run on, which is made again; times are as if it had not."""
    system = MadeUpSystem(slower=lambda system: 1.5 if promised(system) else 1.0)
    report = compare(ONE_POLICY, tmp_path, prompts, monkeypatch, system)
    assert promised(system) == 3
    cell = report["policies"]["adaptive"]["40"]
    assert [run["pace"] for run in cell["runs"]] == [pytest.approx(1.5, abs=0.01)] * 2
    assert [run["change"] for run in cell["runs"]] == [pytest.approx(1.0, abs=0.01)] * 2
    assert (cell["disturbed"], cell["attainment"]) == (0, 1.0)
    assert 50.0 < cell["tpot_ms"]["p50"] < 70.0
    assert cell["finetune_tokens_per_s"] == pytest.approx(1.5 * TRAINED_PER_S["adaptive"], rel=0.05), (
        "this machine trains as fast as before, so it is faster than its clock"
    )
    last = [change for change in system.changes if (change.slo_tpot_ms or 0) < 1e6][-1]
    assert last.slo_tpot_ms == pytest.approx(1.5 * 110.0, rel=0.01)
    assert last.slo_ttft_ms == pytest.approx(1.5 * 5000.0, rel=0.01)
    kept = CompareStore(tmp_path).read(next(ONE_POLICY.runs()))
    assert kept is not None
    assert max(request.at_s for request in kept.requests) <= ONE_POLICY.length_s
    assert max(moment.at_s for moment in kept.moments) <= ONE_POLICY.length_s + ONE_POLICY.grace_s
    print_summary(report)
    assert "faster or slower" not in capsys.readouterr().out


@pytest.mark.parametrize("for_good", [False, True])
def test_a_promise_is_not_made_in_a_slow_minute(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, for_good: bool
) -> None:
    """The machine becomes slower when requests are served one by one, until that is over or for good."""
    begins = 1 + LIGHT_ANSWERS
    ends = math.inf if for_good else begins + ONE_POLICY.light_requests + LIGHT_ANSWERS
    slower = lambda system: 1.5 if begins < len(system.prompts) <= ends else 1.0  # noqa: E731
    report = compare(ONE_POLICY, tmp_path, prompts, monkeypatch, MadeUpSystem(slower=slower))
    assert report["light_tpot_ms"] == pytest.approx(55.0, rel=0.01)
    assert report["slo"]["tpot_ms"] == pytest.approx(2 * report["light_tpot_ms"])


def test_a_machine_that_does_not_settle_is_reported(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system = MadeUpSystem(slower=lambda system: 1.2 ** promised(system))
    report = compare(ONE_POLICY, tmp_path, prompts, monkeypatch, system)
    assert promised(system) == 4, "two tries for each of two runs"
    cell = report["policies"]["adaptive"]["40"]
    assert [run["change"] for run in cell["runs"]] == [pytest.approx(1.2, abs=0.02)] * 2, (
        "also where the clock goes no slower any more"
    )
    assert cell["disturbed"] == 2
    write_results(CompareStore(tmp_path), ONE_POLICY, ONE_POLICY.load_trace(), "harli bench run")
    assert "2 of them disturbed" in (tmp_path / "report.html").read_text()
    print_summary(report)
    assert "2 of 2 runs: the machine became over 15% faster or slower" in capsys.readouterr().out


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "basis.json").write_text('{"light_tpot_ms": 55.0, "targets": [], "ladder": []}')
    with pytest.raises(ConfigError, match=r"of another version .* choose another --out"):
        CompareStore(tmp_path).basis()


def test_a_promise_that_serving_alone_cannot_keep_is_said_before_any_run(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLAN.model_copy(update={"slos": (SloAsked(label="40ms", tpot_ms=40.0),)})
    with pytest.raises(
        UsageError, match=r"cannot keep 40ms on this machine: one request at a time takes 55\.0 ms"
    ):
        compare(plan, tmp_path, prompts, monkeypatch)
    assert not list((tmp_path / "runs").iterdir())


def test_first_tokens_count_too(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLAN.model_copy(update={"ttft_ms": 40.0})
    with pytest.raises(UsageError, match="first token within 40 ms"):
        compare(plan, tmp_path, prompts, monkeypatch)


def test_answers_that_do_not_come_have_failed(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLAN.model_copy(update={"policies": ("train_only",), "slos": PLAN.slos[:1], "loads": (40,)})
    report = compare(plan, tmp_path, prompts, monkeypatch)
    cell = report["policies"]["train_only"]["40"]
    assert cell["failed"] == cell["requests"] > 0
    assert cell["attainment"] == 0.0
    assert report["verdicts"] == {}


def test_a_job_that_fails_ends_the_comparison(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JobFailed, match="ftjob-0 failed"):
        compare(PLAN, tmp_path, prompts, monkeypatch, MadeUpSystem(job_fails=True))


def test_the_lesson_fills_its_sequences(tmp_path: Path, prompts: Prompts) -> None:
    write_lesson(tmp_path / "lesson.jsonl", prompts, 128)
    lines = (tmp_path / "lesson.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == EXAMPLES
    turns = json.loads(lines[0])["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert sum(len(turn["content"].split()) for turn in turns) == 96


@pytest.mark.parametrize(
    "unkept",
    [SloAsked(label="40ms", tpot_ms=40.0), SloAsked(label="56ms", tpot_ms=55.5)],
    ids=["alone", "at any rate"],
)
def test_of_several_promises_one_that_serving_alone_cannot_keep_is_left_out(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, unkept: SloAsked
) -> None:
    kept = PLAN.slos[0]
    plan = PLAN.model_copy(
        update={"slos": (kept, unkept), "policies": ("serve_only",), "loads": (40,), "repetitions": 1}
    )
    report = compare(plan, tmp_path, prompts, monkeypatch)
    assert {run.slo for run in plan.runs() if CompareStore(tmp_path).has(run)} == {kept.label}
    assert set(report["slos"] if "slos" in report else {kept.label: report["slo"]}) == {kept.label}
    basis = CompareStore(tmp_path).basis()
    assert basis is not None
    assert basis.kept == {kept.label}


async def test_the_capacity_was_tried_and_kept(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is returned is a rate at which the promise was kept in every part, if not always at the first try."""
    run = CompareRun(
        MadeUpSystem(), "tiny", PLAN, PLAN.load_trace(), prompts, CompareStore(tmp_path), lambda *_: None
    )
    tried: list[tuple[float, int]] = []

    async def keeps(promise: Any, rate: float, repetition: int) -> bool:
        tried.append((round(rate, 3), repetition))
        return rate < 8.5 and tried.count(tried[-1]) == 2

    monkeypatch.setattr(run, "_keeps", keeps)
    found = await run._check_capacity(Promise("2x", 110.0), 10.0)
    assert found == pytest.approx(8.1)
    assert tried == [(10.0, 0)] * 2 + [(9.0, 0)] * 2 + [(8.1, 0)] * 2 + [(8.1, 1)] * 2
    assert await run._check_capacity(Promise("2x", 110.0), 100.0) is None
