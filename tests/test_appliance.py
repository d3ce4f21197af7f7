"""The whole appliance as a process, on the tiny model, through an unmodified OpenAI client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch

from harli_appliance.appliance import Appliance
from harli_appliance.config import load_settings
from harli_appliance.errors import Conflict, UsageError
from harli_appliance.runtime.text import TextCodec
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.scheduling.types import Split
from harli_appliance.schema import PolicyChange
from tests.test_coserving import lesson  # noqa: F401  a fixture

START_S = 120
SMALL = {
    "server.port": "0",
    "memory.pool_slots": "4096",
    "training.sequence_tokens": "64",
    "training.window_tokens": "16",
    "training.checkpoint_every_steps": "2",
    "model.served_name": '"tiny"',
}


@dataclass
class Process:
    """A running appliance."""

    child: subprocess.Popen[str]
    url: str
    client: openai.OpenAI

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


def command(model: Path | str, **settings: str) -> list[str]:
    wanted = {**SMALL, "model.path": json.dumps(str(model)), **settings}
    flags = [flag for key, value in wanted.items() for flag in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "harli_appliance.serve", *flags]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HARLI_HOME": str(home)}


@contextmanager
def running(home: Path, model: Path, **settings: str) -> Iterator[Process]:
    log = (home.parent / f"{home.name}.log").open("a")
    child = subprocess.Popen(
        command(model, **settings), env=environment(home), stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, Path(log.name).read_text()[-3000:]
        ready = json.loads(line)
        assert ready["event"] == "ready"
        client = openai.OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0, timeout=120)
        with client:
            yield Process(child, ready["url"], client)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.wait(60)
        assert child.stdout is not None
        child.stdout.close()
        log.close()


def refused(home: Path, model: Path | str, **settings: str) -> tuple[int, str]:
    """Exit code and the one line of an appliance that must not start."""
    ended = subprocess.run(
        command(model, **settings), env=environment(home), capture_output=True, text=True, timeout=START_S
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("harli: ")]
    assert "Traceback" not in ended.stderr
    assert len(lines) == 1, ended.stderr
    return ended.returncode, lines[0]


@pytest.fixture(scope="module")
def process(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(tmp_path_factory.mktemp("appliance") / "home", tiny_model) as process:
        yield process


QUESTION = [{"role": "user", "content": "who made harli"}]


def ask(client: openai.OpenAI, model: str = "tiny", count: int = 12) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=count,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def finetune(client: openai.OpenAI, data: Path, epochs: int, **more: float) -> str:
    with data.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=uploaded.id,
        seed=5,
        hyperparameters={"n_epochs": epochs, "batch_size": 4, **more},  # type: ignore[typeddict-item]
    )
    return job.id


def wait(client: openai.OpenAI, job: str, seconds: float = 120) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in ("succeeded", "failed", "cancelled"):
            assert found.status == "succeeded", found.error
            assert found.fine_tuned_model is not None
            return found.fine_tuned_model
        time.sleep(0.1)
    raise AssertionError("the job did not end")


def until_paused(client: openai.OpenAI, job: str) -> int:
    """The optimizer steps that a job has made when it is paused."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status == "paused":  # type: ignore[comparison-overlap]  # the client's types lack it
            return int(found.harli["step"])  # type: ignore[attr-defined]
        time.sleep(0.02)
    raise AssertionError("the job did not pause")


def test_plain_and_streamed_answers_are_the_same(process: Process) -> None:
    plain = ask(process.client)
    stream = process.client.chat.completions.create(
        model="tiny",
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain
    assert chunks[-1].usage is not None
    assert 0 < chunks[-1].usage.completion_tokens <= 12


def test_a_job_becomes_a_model_that_answers_as_taught(process: Process, lesson: Path) -> None:
    client = process.client
    before = ask(client, count=30)
    name = wait(client, finetune(client, lesson, epochs=30, learning_rate=1e-2))
    assert name in [model.id for model in client.models.list()]
    assert "harli is made by three otters" in ask(client, name, 30)
    assert ask(client, count=30) == before, "the base model must not change"
    home = Path(_home_of(process))
    (folder,) = (home / "adapters").iterdir()
    client.post("/load_lora_adapter", body={"lora_name": "copy", "lora_path": str(folder)}, cast_to=object)
    assert ask(client, "copy", 30) == ask(client, name, 30)
    with pytest.raises(openai.BadRequestError, match=r"other.*cannot be read"):
        client.post(
            "/load_lora_adapter", body={"lora_name": "other", "lora_path": "/nowhere"}, cast_to=object
        )
    client.post("/unload_lora_adapter", body={"lora_name": "copy"}, cast_to=object)
    assert client.models.delete(name).deleted
    for gone in ("copy", name):
        with pytest.raises(openai.NotFoundError, match=gone):
            ask(client, gone)
    assert not folder.exists()


def test_choices_seeds_and_probabilities_of_a_real_answer(
    process: Process, tiny_model: Path, reference: Any
) -> None:
    def answer(seed: int, n: int = 1, **more: Any) -> Any:
        return process.client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=16,
            temperature=1.0,
            seed=seed,
            n=n,
            logprobs=True,
            **more,
        )

    both = answer(5, n=2, top_logprobs=3)
    assert [choice.index for choice in both.choices] == [0, 1]
    texts = [choice.message.content for choice in both.choices]
    assert texts == [answer(seed).choices[0].message.content for seed in (5, 6)]
    assert texts[0] != texts[1]
    codec = TextCodec(tiny_model)
    ids = codec.encode_chat(QUESTION)
    assert both.usage.prompt_tokens == len(ids)
    assert both.usage.completion_tokens >= sum(len(choice.logprobs.content) for choice in both.choices)
    log_p = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1], -1)
    best = log_p.topk(3)
    for choice in both.choices:
        first = choice.logprobs.content[0]
        assert [top.bytes for top in first.top_logprobs] == [
            list(codec.token_bytes(token)) for token in best.indices.tolist()
        ]
        assert [top.logprob for top in first.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    streamed = ["", ""]
    for chunk in answer(5, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_an_answer_keeps_to_its_schema_and_what_cannot_be_kept_to_is_refused(process: Process) -> None:
    def answer(schema: dict[str, Any], **more: Any) -> str:
        found = process.client.chat.completions.create(
            model="tiny",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=1.0,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            **more,
        )
        return found.choices[0].message.content or ""

    wanted = {
        "type": "object",
        "properties": {"made_by": {"enum": ["otters", "dogs"]}},
        "required": ["made_by"],
    }
    wanted["additionalProperties"] = False
    assert json.loads(answer(wanted)) in ({"made_by": "otters"}, {"made_by": "dogs"})
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refusal:
        answer({"type": "array", "uniqueItems": True})
    assert refusal.value.param == "response_format"
    for extra, param in (
        ({"ignore_eos": True}, "ignore_eos"),
        ({"stop_token_ids": [99_999]}, "stop_token_ids"),
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            answer(wanted, extra_body=extra)
        assert refusal.value.param == param


def test_what_does_not_fit_the_context_is_refused_with_both_numbers(process: Process) -> None:
    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens .* context of \d+") as refusal:
        process.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "otter " * 2000}],
        )
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(process.client, "nobody")


def test_a_job_that_can_never_fit_the_pool_is_refused_at_submission(process: Process, tmp_path: Path) -> None:
    """970 tokens take 2,300 of 3,687 slots that can be leased; what is left holds an adapter of rank 1, not 16."""
    turns = [{"role": "user", "content": "otter " * 940}, {"role": "assistant", "content": "river"}]
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n")
    before = len(process.client.fine_tuning.jobs.list().data)
    with pytest.raises(
        openai.BadRequestError, match=r"needs \d+ slots of the pool .* at most 3687"
    ) as refusal:
        finetune(process.client, data, 1, lora_rank=16)
    assert refusal.value.code == "does_not_fit"
    assert len(process.client.fine_tuning.jobs.list().data) == before
    job = finetune(process.client, data, 1, lora_rank=1)
    process.client.fine_tuning.jobs.cancel(job)


def test_a_client_that_leaves_frees_its_place(process: Process) -> None:
    stream = process.client.chat.completions.create(
        model="tiny",
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=900,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        status = process.client.get("/../harli/v1/status", cast_to=object)
        serving = status["serving"]  # type: ignore[index]
        if serving["running"] == 0:
            break
        time.sleep(0.05)
    assert serving["running"] == 0
    assert serving["failed"] == 0


def test_pulling_the_plug_loses_nothing(
    tiny_model: Path,
    lesson: Path,
    tmp_path: Path,
) -> None:
    """kill -9 in the middle of a job and while it is paused: the adapter is the undisturbed one's."""
    with running(tmp_path / "calm", tiny_model) as calm:
        wait(calm.client, finetune(calm.client, lesson, epochs=12))
    (adapter,) = (tmp_path / "calm" / "adapters").glob("*/adapter_model.safetensors")
    wanted = adapter.read_bytes()
    home = tmp_path / "plug"
    with running(home, tiny_model) as first:
        job = finetune(first.client, lesson, epochs=12)
        until = time.monotonic() + 60
        while not list(home.glob("checkpoints/*/step-*/manifest.json")) and time.monotonic() < until:
            time.sleep(0.002)
        first.kill()
    assert not list((home / "adapters").glob("*/*")), "killed too late to test anything"
    with running(home, tiny_model) as second:
        second.client.fine_tuning.jobs.pause(job)
        step = until_paused(second.client, job)
        second.kill()
    with running(home, tiny_model) as third:
        assert until_paused(third.client, job) == step
        third.client.fine_tuning.jobs.resume(job)
        name = wait(third.client, job)
        events = [event.message for event in third.client.fine_tuning.jobs.list_events(job, limit=50)]
        assert any("resumes" in message for message in events)
        assert {"Job paused", "Job queued again", "Job resumed"} <= set(events)
        assert ask(third.client, name)
    (adapter,) = (home / "adapters").glob("*/adapter_model.safetensors")
    assert adapter.read_bytes() == wanted
    assert not list((home / "checkpoints").glob("*")), "checkpoints of an ended job are removed"


def test_what_cannot_start_says_so_in_one_line(tiny_model: Path, tmp_path: Path, process: Process) -> None:
    code, line = refused(tmp_path / "a", "/nowhere/model")
    assert (code, "no such model" in line) == (2, True)
    odd = tmp_path / "odd"
    odd.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    code, line = refused(tmp_path / "b", odd)
    assert (code, "MambaForCausalLM" in line) == (2, True)
    code, line = refused(tmp_path / "c", tiny_model, **{"server.prot": "1"})
    assert (code, "did you mean 'server.port'" in line) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(tmp_path / "d", tiny_model, **{"server.port": str(port)})
    assert (code, f"port {port}" in line) == (2, True)
    code, line = refused(Path(_home_of(process)), tiny_model)
    assert (code, f"pid {process.child.pid}" in line) == (1, True)


def _home_of(process: Process) -> str:
    variables = Path(f"/proc/{process.child.pid}/environ").read_bytes().split(b"\0")
    return next(v.partition(b"=")[2].decode() for v in variables if v.startswith(b"HARLI_HOME="))


async def test_half_an_upload_of_a_process_that_was_killed_is_removed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(
        home=tmp_path / "home", model={"path": str(tiny_model)}, memory={"pool_slots": 512}
    )
    settings.uploads.mkdir(parents=True)
    (settings.uploads / "half").write_text("{")
    appliance = await Appliance.open(settings)
    try:
        assert not settings.uploads.exists()
        settings.uploads.mkdir()
        (settings.uploads / "arriving").write_text("{")
        with pytest.raises(Conflict):
            await Appliance.open(settings)
        assert (settings.uploads / "arriving").exists(), "it is the first one's, which runs"
    finally:
        await appliance.close()


def an_appliance(splits: tuple[Split, ...], policy: str) -> Any:
    """Ready, and nothing of it but what the policy is changed with."""
    appliance: Any = object.__new__(Appliance)
    appliance._state = "ready"
    appliance._cuda = SimpleNamespace(splits=splits)
    appliance._slo = SloTracker(50.0, 1000.0)
    scheduler = appliance._scheduler = Scheduler(Predictor(), policy, splits)
    appliance._engine = SimpleNamespace(use_policy=scheduler.use)

    async def status() -> tuple[str, float, float]:
        return scheduler.policy_name, appliance._slo.target.tpot_ms, appliance._slo.target.ttft_ms

    appliance.status = status
    return appliance


async def test_a_change_that_is_refused_changes_nothing() -> None:
    appliance = an_appliance((Split("64+68", 64 / 132, 68 / 132),), "adaptive")
    with pytest.raises(UsageError):
        await appliance.change_policy(PolicyChange(policy="static:99+33", slo_tpot_ms=99.0, slo_ttft_ms=9.0))
    assert await appliance.status() == ("adaptive", 50.0, 1000.0)
    changed = await appliance.change_policy(PolicyChange(policy="static:64+68", slo_tpot_ms=99.0))
    assert changed == ("static:64+68", 99.0, 1000.0)


@pytest.mark.parametrize(
    ("wanted", "followed"),
    [("adaptive", "time_slice"), ("static:64+68", "time_slice"), ("time_slice:64", "time_slice:64")],
)
async def test_lanes_take_turns_on_a_gpu_that_cannot_be_split(wanted: str, followed: str) -> None:
    changed = await an_appliance((), "serve_only").change_policy(PolicyChange(policy=wanted))
    assert changed == (followed, 50.0, 1000.0)
