"""The command line against a fake appliance: output, JSON, exit codes, and how little it imports."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harli_appliance.cli import serve as serve_command
from harli_appliance.cli.main import run
from harli_appliance.cli.reference import reference
from tests.fakes import BASE, FakeAppliance, listening, words

ROOT = Path(__file__).parent.parent
LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the person who runs the tests."""
    for name in ("HARLI_URL", "HARLI_API_KEY", "HARLI_SERVER__PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HARLI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAppliance]:
    """A fake appliance on a thread of its own; HARLI_URL points to it."""
    folder = tmp_path / "appliance"
    folder.mkdir()
    appliance = FakeAppliance(folder)
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    address: list[str] = []

    async def live() -> None:
        async with listening(appliance) as listener:
            address.append(listener.url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    assert started.wait(10)
    monkeypatch.setenv("HARLI_URL", address[0])
    yield appliance
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


Out = Callable[[], tuple[str, str]]


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Out:
    """What went to stdout and stderr since the last call."""
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(LINE)
    return path


# -- the shell's side --------------------------------------------------------------------------------


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


# -- looking -----------------------------------------------------------------------------------------


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


# -- asking ------------------------------------------------------------------------------------------


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


# -- jobs --------------------------------------------------------------------------------------------


def test_a_job_from_a_file(port: FakeAppliance, training_file: Path, out: Out) -> None:
    options = ["--epochs", "2", "--batch-size", "3", "--learning-rate", "1e-3", "--lora-rank", "4"]
    options += ["--rslora", "--lora-dropout", "0.1", "--lr-scheduler", "linear", "--warmup-ratio", "0"]
    options += ["--max-grad-norm", "2"]
    assert run(["jobs", "create", str(training_file), *options, "--suffix", "harbour", "--seed", "7"]) == 0
    assert out()[0] == "ftjob-0\n"
    spec = port.specs[0]
    assert (spec.model, spec.n_epochs, spec.batch_size) == (BASE, 2, 3)
    assert (spec.learning_rate, spec.lora_rank, spec.suffix, spec.seed) == (1e-3, 4, "harbour", 7)
    assert (spec.use_rslora, spec.lora_dropout) == (True, 0.1)
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


def test_cancel(port: FakeAppliance, training_file: Path, out: Out) -> None:
    run(["jobs", "create", str(training_file)])
    out()
    assert run(["jobs", "cancel", "ftjob-0"]) == 0
    assert out()[0] == "ftjob-0 cancelled\n"
    port.update("ftjob-0", status="succeeded")
    assert run(["jobs", "cancel", "ftjob-0"]) == 1


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


# -- data --------------------------------------------------------------------------------------------


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
    assert lengths.count(messages) == len(theirs)
    long = tmp_path / "long.jsonl"
    long.write_text(
        json.dumps({"messages": [messages[0], {"role": "assistant", "content": "a b c " * 2000}]})
    )
    assert run(["data", "check", str(long), "--model", str(tiny_model), "--json"]) == 1
    assert "examples_too_long" in [error["code"] for error in json.loads(out()[0])["errors"]]
    assert run(["data", "check", str(long), "--model", "not-here"]) == 2


# -- serve -------------------------------------------------------------------------------------------


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `harli serve` would have become."""
    calls: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, arguments: calls.append(arguments))
    return calls


def test_serve_hands_its_flags_over(executed: list[list[str]]) -> None:
    flags = ["--port", "0", "--slo-tpot", "0.2s", "--policy", "time_slice", "--set", "memory.pool_slots=512"]
    assert run(["serve", *flags]) == 0
    (arguments,) = executed
    assert arguments[1:3] == ["-m", "harli_appliance.serve"]
    pairs = set(zip(arguments[3::2], arguments[4::2], strict=True))
    assert pairs == {
        ("--set", "memory.pool_slots=512"),
        ("--set", "server.port=0"),
        ("--set", "slo.tpot_ms=200.0"),
        ("--set", "scheduling.policy=time_slice"),
    }


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--port", "99999"], "server.port"),
        (["--policy", "best"], "no such policy; choose one of adaptive, harli, naive, time_slice"),
        (["--config", "none.toml"], "no such file"),
        (["--set", "memory.pool_slot=5"], "did you mean 'memory.pool_slots'"),
        (["--slo-tpot", "fast"], "no duration"),
        (["--set", "memory"], "sets nothing"),
    ],
)
def test_serve_refuses_wrong_settings_before_anything_starts(
    executed: list[list[str]], out: Out, flags: list[str], word: str
) -> None:
    assert run(["serve", *flags]) == 2
    assert word in " ".join(out()[1].split())
    assert executed == []


@pytest.mark.parametrize(("text", "ms"), [("200ms", 200), ("200", 200), ("0.2s", 200), (" 1.5 s", 1500)])
def test_durations(text: str, ms: float) -> None:
    assert serve_command.parse_ms(text) == ms
