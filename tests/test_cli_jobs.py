"""The command line's jobs and training files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harli_appliance.cli.main import run
from harli_appliance.client import HarliClient
from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.schema import JobView
from tests.cli_rig import (  # noqa: F401  fixtures
    LINE,
    Out,
    apart,
    out,
    port,
    training_file,
)
from tests.fakes import BASE, FakeAppliance


def test_a_job_from_a_file(port: FakeAppliance, training_file: Path, out: Out) -> None:
    options = ["--epochs", "2", "--batch-size", "3", "--learning-rate", "1e-3", "--lora-rank", "4"]
    options += ["--rslora", "--lora-dropout", "0.1", "--lr-scheduler", "linear", "--warmup-ratio", "0"]
    options += ["--max-grad-norm", "2", "--peft-method", "lora", "--target-modules", "q_proj,v_proj"]
    assert run(["jobs", "create", str(training_file), *options, "--suffix", "harbour", "--seed", "7"]) == 0
    assert out()[0] == "ftjob-0\n"
    spec = port.specs[0]
    assert (spec.model, spec.n_epochs, spec.batch_size) == (BASE, 2, 3)
    assert (spec.learning_rate, spec.lora_rank, spec.suffix, spec.seed) == (1e-3, 4, "harbour", 7)
    assert (spec.use_rslora, spec.lora_dropout) == (True, 0.1)
    assert (spec.peft_method, spec.target_modules) == ("lora", ("q_proj", "v_proj"))
    assert (spec.lr_scheduler_type, spec.warmup_ratio, spec.max_grad_norm) == ("linear", 0.0, 2.0)
    assert port.stored[spec.training_file].filename == "train.jsonl"
    assert run(["jobs", "create", spec.training_file, "--json"]) == 0
    assert json.loads(out()[0])["training_file"] == spec.training_file
    assert (port.specs[1].use_rslora, port.specs[1].lora_dropout) == (None, None)
    assert len(port.stored) == 1
    assert run(["jobs", "show", "ftjob-0"]) == 0
    assert "dropout 0.1, rank-stabilised" in out()[0]


def test_files_that_cannot_be_used(port: FakeAppliance, tmp_path: Path, out: Out) -> None:
    assert run(["jobs", "create", "nothing.jsonl"]) == 2
    assert "no such file" in out()[1]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("broken")
    assert run(["jobs", "create", str(broken)]) == 1
    assert "harli data check" in out()[1]
    assert port.specs == []


def test_list_and_show(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file)])
    port.update("ftjob-0", status="failed", error_code="diverged", error_message="the loss is NaN", step=3)
    out()
    assert run(["jobs", "list"]) == 0
    assert "3/10" in out()[0]
    assert run(["jobs", "show", "ftjob-0"]) == 0
    stdout = out()[0]
    assert "the loss is NaN" in stdout
    assert "rank 8, alpha 16" in stdout
    assert run(["jobs", "list", "--json"]) == 0
    assert json.loads(out()[0])["data"][0]["status"] == "failed"
    assert run(["jobs", "show", "ftjob-none"]) == 1


def test_a_job_of_another_model_is_shown_to_wait_for_it(
    port: FakeAppliance, training_file: Path, out: Out
) -> None:
    run(["jobs", "create", str(training_file)])
    run(["jobs", "create", str(training_file)])
    port.update("ftjob-0", model="tiny-a")
    port.update("ftjob-1", model="tiny-a", status="cancelled")
    out()
    for command in (["jobs", "list"], ["jobs", "show", "ftjob-0"]):
        assert run(command) == 0
        assert out()[0].count("queued, waits for tiny-a") == 1
    job = JobView(id="ftjob-0", status="queued", model="tiny-a", waits_for="tiny-a", created_at=1)
    port.status_now = port.status_now.model_copy(update={"jobs": [job]})
    assert run(["ps"]) == 0
    assert "queued, waits for tiny-a" in out()[0]


def test_cancel(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file)])
    out()
    assert run(["jobs", "cancel", "ftjob-0"]) == 0
    assert out()[0] == "ftjob-0 cancelled\n"
    port.update("ftjob-0", status="succeeded")
    assert run(["jobs", "cancel", "ftjob-0"]) == 1


def test_pause_and_resume(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file)])
    out()
    assert run(["jobs", "pause", "ftjob-0"]) == 0
    assert out() == ("ftjob-0 paused\n", "")
    assert run(["ps"]) == 0
    out()
    assert run(["jobs", "resume", "ftjob-0"]) == 0
    assert out() == ("ftjob-0 queued\n", "")
    port.update("ftjob-0", status="running")
    assert run(["jobs", "pause", "ftjob-0"]) == 0
    assert out() == ("ftjob-0 running\n", "it is paused as soon as its work unit ends\n")
    assert run(["jobs", "resume", "ftjob-0"]) == 1


def test_priority(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file), "--priority", "30"])
    assert port.specs[0].priority == 30
    out()
    assert run(["jobs", "priority", "ftjob-0", "5"]) == 0
    assert out() == ("ftjob-0 queued, priority 5\n", "")
    assert run(["jobs", "show", "ftjob-0"]) == 0
    assert re.search(r"priority +5\n", out()[0])
    assert run(["jobs", "priority", "ftjob-0", "500"]) == 2


def test_a_job_is_named_by_a_part_of_its_id_its_adapter_or_as_the_last(
    port: FakeAppliance, training_file: Path, out: Out
) -> None:
    for _ in range(3):
        run(["jobs", "create", str(training_file)])
    long = port.update("ftjob-1", id="ftjob-7b30", fine_tuned_model="ft:x", status="succeeded")
    port.all_jobs = {job.id: job for job in (port.all_jobs["ftjob-0"], long, port.all_jobs["ftjob-2"])}
    out()
    for told, meant in (
        ("last", "ftjob-2"),
        ("7b", "ftjob-7b30"),
        ("ftjob-…b30", "ftjob-7b30"),
        ("ft:x", "ftjob-7b30"),
    ):
        assert run(["jobs", "show", told]) == 0
        assert meant in out()[0]
    assert run(["jobs", "show", "0"]) == 2
    assert "'0' could be 2 jobs: ftjob-7b30, ftjob-0; write more of the id" in out()[1]
    assert run(["jobs", "cancel", "nothing"]) == 1
    assert "no job 'nothing'; 'harli jobs list' shows" in out()[1]


def test_wait_tells_how_it_ended(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file)])
    port.update("ftjob-0", status="succeeded", fine_tuned_model="ft:x", step=10)
    out()
    assert run(["jobs", "wait", "ftjob-0"]) == 0
    stdout, stderr = out()
    assert stdout == "ft:x\n"
    assert "10/10" in stderr
    port.update("ftjob-0", status="failed", error_code="diverged", error_message="the loss is NaN")
    assert run(["jobs", "wait", "ftjob-0", "--json"]) == 4
    stdout, stderr = out()
    assert json.loads(stdout)["status"] == "failed"
    assert "harli: ftjob-0 failed: the loss is NaN" in stderr
    port.update("ftjob-0", status="cancelled", error_code=None, fine_tuned_model=None)
    assert run(["jobs", "wait", "ftjob-0"]) == 4


def test_create_and_wait(
    port: FakeAppliance, training_file: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = port.create_job

    async def ends_at_once(spec):  # type: ignore[no-untyped-def]
        job = await create(spec)
        return port.update(job.id, status="succeeded", fine_tuned_model="ft:y", step=10)

    monkeypatch.setattr(port, "create_job", ends_at_once)
    assert run(["jobs", "create", str(training_file), "--wait"]) == 0
    assert out()[0] == "ft:y\n"


def test_events_oldest_first_over_several_pages(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file)])
    for step in range(150):
        port.happen("ftjob-0", f"step {step}", step=step)
    out()
    assert run(["jobs", "events", "ftjob-0"]) == 0
    lines = out()[0].splitlines()
    assert len(lines) == 151
    assert lines[0].endswith("job created")
    assert lines[-1].endswith("step 149")


def test_events_are_followed_to_the_end_without_repeating(
    port: FakeAppliance, training_file: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["jobs", "create", str(training_file)])
    out()
    looks = 0
    look = port.job

    async def goes_on(job_id: str):  # type: ignore[no-untyped-def]
        nonlocal looks
        looks += 1
        if looks == 2:
            port.happen(job_id, "step 1", step=1)
        elif looks == 5:
            port.happen(job_id, "done")
            port.update(job_id, status="succeeded")
        return await look(job_id)

    monkeypatch.setattr(port, "job", goes_on)
    monkeypatch.setattr("harli_appliance.cli.watching.POLL_S", 0.01)
    assert run(["jobs", "events", "ftjob-0", "--follow", "--json"]) == 0
    messages = [json.loads(line)["message"] for line in out()[0].splitlines()]
    assert messages == ["job created", "step 1", "done"]


def test_events_are_followed_over_a_short_silence(
    port: FakeAppliance, training_file: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["jobs", "create", str(training_file)])
    out()
    looks = 0
    look = HarliClient.job

    async def restarts(client: HarliClient, job_id: str):  # type: ignore[no-untyped-def]
        nonlocal looks
        looks += 1
        if looks in (3, 4):
            raise ApplianceUnavailable("the appliance is stopping")
        if looks == 6:
            port.happen(job_id, "done")
            port.update(job_id, status="succeeded")
        return await look(client, job_id)

    monkeypatch.setattr(HarliClient, "job", restarts)
    monkeypatch.setattr("harli_appliance.cli.watching.POLL_S", 0.01)
    assert run(["jobs", "events", "ftjob-0", "--follow", "--json"]) == 0
    assert [json.loads(line)["message"] for line in out()[0].splitlines()] == ["job created", "done"]
    looks = 2
    assert run(["jobs", "events", "ftjob-0", "--follow"]) == 3
    assert out() == ("", "harli: the appliance is stopping\n"), "it had not answered yet"
    monkeypatch.setattr("harli_appliance.cli.watching.SILENCE_S", 0.0)
    port.update("ftjob-0", status="running")
    looks = 0
    assert run(["jobs", "events", "ftjob-0", "--follow"]) == 3
    assert looks == 3


def test_data_check_tells_of_every_bad_line(tmp_path: Path, out: Out) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]\n" * 250)
    assert run(["data", "check", str(bad)]) == 1
    stdout = out()[0]
    assert [f"{bad}:{line}: error:" in stdout for line in range(1, 251)] == [True] * 250
    assert run(["data", "check", str(bad), "--json"]) == 1
    assert [error["line"] for error in json.loads(out()[0])["errors"]] == list(range(1, 251))


def test_data_check(training_file: Path, tmp_path: Path, out: Out) -> None:
    assert run(["data", "check", str(training_file), "--json"]) == 0
    report = json.loads(out()[0])
    assert (report["ok"], report["examples"], report["errors"]) == (True, 1, [])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(LINE + "{\n")
    assert run(["data", "check", str(bad)]) == 1
    stdout = out()[0]
    assert f"{bad}:2: error:" in stdout
    assert "refused" in stdout
    assert run(["data", "check", str(bad), "--json"]) == 1
    assert json.loads(out()[0])["errors"][0]["line"] == 2
    assert run(["data", "check", str(tmp_path / "none.jsonl")]) == 1
    assert "No such file" in out()[0]


def test_data_check_counts_tokens_as_the_model_does(tiny_model: Path, tmp_path: Path, out: Out) -> None:
    from transformers import AutoTokenizer

    from harli_appliance.cli.lengths import installed_lengths
    from harli_appliance.config import load_settings

    lengths = installed_lengths(load_settings(), str(tiny_model))
    assert lengths is not None
    messages = [
        {"role": "user", "content": "who made the otter?"},
        {"role": "assistant", "content": "Harli ü"},
    ]
    theirs = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(messages, return_dict=False)
    assert lengths.encode_chat(messages, generation_prompt=False) == theirs
    long = tmp_path / "long.jsonl"
    long.write_text(
        json.dumps({"messages": [messages[0], {"role": "assistant", "content": "a b c " * 2000}]})
    )
    assert run(["data", "check", str(long), "--model", str(tiny_model), "--json"]) == 1
    assert "examples_too_long" in [error["code"] for error in json.loads(out()[0])["errors"]]
    assert run(["data", "check", str(long), "--model", "not-here"]) == 2


def test_the_adapter_of_a_job_is_fetched(
    port: FakeAppliance, training_file: Path, tmp_path: Path, out: Out
) -> None:
    assert run(["jobs", "create", str(training_file), "--peft-method", "ia3"]) == 0
    assert run(["jobs", "show", "ftjob-0"]) == 0
    assert "IA3" in out()[0]
    assert run(["jobs", "download", "ftjob-0", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "ftjob-0").exists()
    port.update("ftjob-0", status="succeeded", finished_at=1_790_000_500, fine_tuned_model="ft:1")
    (port.folder / "adapter").mkdir()
    (port.folder / "adapter" / "adapter_config.json").write_text("{}")
    out()
    assert run(["jobs", "download", "ftjob-0", "--out", str(tmp_path)]) == 0
    assert out()[0] == f"{tmp_path / 'ftjob-0'}\n"
    assert (tmp_path / "ftjob-0" / "adapter_config.json").read_text() == "{}"
    assert run(["jobs", "download", "ftjob-0", "--out", str(tmp_path)]) == 2
    assert "there already" in out()[1]
    for told in ("last", "0", "ft:1"):
        assert run(["jobs", "download", told, "--out", str(tmp_path / told)]) == 0
        assert (tmp_path / told / "ftjob-0" / "adapter_config.json").exists()
