"""The command line against a fake appliance: output, JSON, exit codes, and how little it imports."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from harli_appliance.cli.main import run
from harli_appliance.cli.reference import reference
from tests.cli_rig import (  # noqa: F401  fixtures
    ROOT,
    Out,
    apart,
    out,
    port,
    training_file,
)
from tests.fakes import BASE, FakeAppliance, words


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "sglang", "transformers", "aiohttp", "textual", "pydantic", "rich.progress")
    code = f"import sys, harli_appliance.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_every_command_is_documented() -> None:
    documented = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert documented == reference(), "run: python -m harli_appliance.cli.reference > docs/cli.md"


def test_no_command_shows_help_and_a_wrong_one_is_usage(out: Out) -> None:
    assert run(["--help"]) == 0
    assert "doctor" in out()[0]
    assert run(["nonsense"]) == 2
    assert run(["jobs", "list", "--limit", "0"]) == 2
    assert run(["--version"]) == 0


@pytest.mark.parametrize(
    "command",
    [["status"], ["ps"], ["run", "hi"], ["jobs", "list"], ["jobs", "wait", "x"], ["top", "--once"]],
)
def test_an_appliance_that_is_not_there_is_one_line_and_exit_3(command: list[str], out: Out) -> None:
    assert run([*command, "--url", "http://127.0.0.1:9"]) == 3
    stdout, stderr = out()
    assert stdout == ""
    assert stderr == (
        "harli: no appliance at http://127.0.0.1:9; start one with 'harli serve', or say where with --url\n"
    )


def test_a_url_that_is_none(out: Out) -> None:
    assert run(["status", "--url", "localhost:80"]) == 2
    assert "no URL" in out()[1]


def test_a_server_that_is_no_appliance(
    port: FakeAppliance, monkeypatch: pytest.MonkeyPatch, out: Out
) -> None:
    import os

    monkeypatch.setenv("HARLI_URL", os.environ["HARLI_URL"] + "/elsewhere")
    assert run(["status"]) == 1
    assert "does not exist" in out()[1]


def test_the_address_comes_from_harli_toml(
    port: FakeAppliance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: Out
) -> None:
    import os

    number = os.environ["HARLI_URL"].rpartition(":")[2]
    monkeypatch.delenv("HARLI_URL")
    (tmp_path / "harli.toml").write_text(f'[server]\nhost = "0.0.0.0"\nport = {number}\n')
    assert run(["ps", "--json"]) == 0
    (tmp_path / "harli.toml").write_text("[server]\nport = 0\n")
    out()
    assert run(["ps"]) == 2
    assert "--url" in out()[1]


def test_status(port: FakeAppliance, out: Out) -> None:
    assert run(["status"]) == 0
    stdout, stderr = out()
    assert "p50 181 ms, p99 233 ms, target 250 ms" in stdout
    assert "99.5%" in stdout
    assert stderr == ""
    assert run(["status", "--json"]) == 0
    assert json.loads(out()[0])["pool"]["slots"] == 16_384


def test_ps(port: FakeAppliance, out: Out) -> None:
    assert run(["ps"]) == 0
    stdout = out()[0]
    assert "6 requests running, 1 waiting" in stdout
    assert "ft:smollm2:harbour" in stdout
    assert "ftjob-wait" in stdout
    assert run(["ps", "--json"]) == 0
    assert [job["id"] for job in json.loads(out()[0])["jobs"]] == ["ftjob-run", "ftjob-wait"]


def test_models_served_and_on_this_machine(port: FakeAppliance, tmp_path: Path, out: Out) -> None:
    folder = tmp_path / "home" / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert run(["models", "--json"]) == 0
    found = json.loads(out()[0])
    assert [model["id"] for model in found["served"]] == [BASE, "ft:smollm2:harbour"]
    assert [model["name"] for model in found["installed"]] == ["mine"]
    assert BASE in [model["name"] for model in found["fetchable"]]


def test_a_finetuned_model_is_deleted(port: FakeAppliance, out: Out) -> None:
    assert run(["models", "delete", "ft:smollm2:harbour"]) == 0
    assert out()[0] == "ft:smollm2:harbour is deleted\n"
    assert [model.id for model in port.models()] == [BASE]
    assert run(["models", "delete", "ft:smollm2:harbour"]) == 1
    assert "no job has made a model" in out()[1]


def test_models_without_an_appliance(out: Out) -> None:
    assert run(["models", "--url", "http://127.0.0.1:9"]) == 0
    stdout, stderr = out()
    assert "fetched when served" in stdout
    assert "no appliance" in stderr


def test_top_once(port: FakeAppliance, out: Out) -> None:
    assert run(["top", "--once"]) == 0
    stdout = out()[0]
    for piece in ("target 250 ms", "core 0", "leased 6,144", "31/100", "both at once", "52.5 tokens/s"):
        assert piece in stdout
    assert run(["top", "--json"]) == 0
    assert json.loads(out()[0])["policy"] == "adaptive"


@pytest.fixture
def _internals_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading SGLang in another process takes ten seconds; `test_internals` looks at its names."""
    monkeypatch.setattr("harli_appliance.cli.checks.INTERNALS", "pass")


@pytest.mark.usefixtures("_internals_not_looked_at")
def test_doctor(port: FakeAppliance, out: Out) -> None:
    assert run(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(out()[0])["checks"]}
    assert checks["appliance"]["level"] == "ok"
    wanted = {"python", "torch", "sglang", "internals", "gpu", "model", "cores", "memory", "home", "disk"}
    assert wanted <= set(checks)
    assert not Path("home").exists()


@pytest.mark.usefixtures("_internals_not_looked_at")
def test_doctor_says_what_must_be_mended(out: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harli_appliance.cli.checks.PACKAGES", {"no-such-package": "1"})
    assert run(["doctor", "--url", "http://127.0.0.1:9"]) == 1
    stdout = out()[0]
    assert "FAIL  no-such-package" in stdout
    assert "make setup" in stdout
    assert "warn  appliance" in stdout


def test_run_streams_the_answer(port: FakeAppliance, out: Out) -> None:
    assert run(["run", "Say hello", "--max-tokens", "5", "--temperature", "0", "--system", "Be kind"]) == 0
    assert out() == ("Hello world!\n", "")
    call = port.calls[0]
    assert (call.model, call.max_tokens, call.temperature) == (BASE, 5, 0.0)
    assert [message["role"] for message in call.messages] == ["system", "user"]


def test_run_reads_a_piped_question(port: FakeAppliance, monkeypatch: pytest.MonkeyPatch, out: Out) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert run(["run", "--model", "ft:smollm2:harbour", "--json"]) == 0
    answer = json.loads(out()[0])
    assert (answer["text"], answer["finish_reason"]) == ("Hello world!", "stop")
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["ttft_ms"] > 0
    assert port.calls[0].messages[0]["content"] == "from a pipe"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(["run"]) == 2


def test_a_conversation_remembers(port: FakeAppliance, monkeypatch: pytest.MonkeyPatch, out: Out) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    questions = iter(["first", "", "second"])

    def ask(prompt: str) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    assert run(["run"]) == 0
    assert [m["content"] for m in port.calls[1].messages] == ["first", "Hello world!", "second"]


def test_an_answer_that_breaks_off_fails(port: FakeAppliance, out: Out) -> None:
    from harli_appliance.errors import EngineFault

    port.deltas, port.failure = words("Hel", finish=None), EngineFault("the step failed")
    assert run(["run", "hi"]) == 1
    assert "the step failed" in out()[1]
