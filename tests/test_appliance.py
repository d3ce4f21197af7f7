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

import openai
import pytest

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

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

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
        yield Process(child, ready["url"])
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


def test_a_job_becomes_a_model_that_answers_as_taught(process: Process, lesson: Path) -> None:  # noqa: F811
    client = process.client
    before = ask(client, count=30)
    name = wait(client, finetune(client, lesson, epochs=30, learning_rate=1e-2))
    assert name in [model.id for model in client.models.list()]
    assert "harli is made by three otters" in ask(client, name, 30)
    assert ask(client, count=30) == before, "the base model must not change"


def test_what_does_not_fit_the_context_is_refused_with_both_numbers(process: Process) -> None:
    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens .* context of \d+") as refusal:
        process.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "otter " * 2000}],
        )
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(process.client, "nobody")


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
    lesson: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """kill -9 in the middle of a job: the next start resumes it, and the adapter is the undisturbed one's."""
    with running(tmp_path / "calm", tiny_model) as calm:
        wait(calm.client, finetune(calm.client, lesson, epochs=4))
    (adapter,) = (tmp_path / "calm" / "adapters").glob("*/adapter_model.safetensors")
    wanted = adapter.read_bytes()
    home = tmp_path / "plug"
    with running(home, tiny_model) as first:
        job = finetune(first.client, lesson, epochs=4)
        until = time.monotonic() + 60
        while not list(home.glob("checkpoints/*/step-*/manifest.json")) and time.monotonic() < until:
            time.sleep(0.002)
        first.kill()
    assert not list((home / "adapters").glob("*/*")), "killed too late to test anything"
    with running(home, tiny_model) as second:
        name = wait(second.client, job)
        events = [event.message for event in second.client.fine_tuning.jobs.list_events(job, limit=50)]
        assert any("resumes" in message for message in events)
        assert ask(second.client, name)
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
