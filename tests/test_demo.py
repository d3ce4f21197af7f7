"""The demo from end to end against a stand-in appliance, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harli_appliance.bench.demo import run
from harli_appliance.bench.demo_run import LESSON, QUESTION, TAUGHT, DemoPlan, training_rate
from harli_appliance.bench.workload import LogNormal, Traffic
from harli_appliance.config import load_settings
from tests.fakes import BASE, make_sample

APPLIANCE = (sys.executable, str(Path(__file__).with_name("demo_appliance.py")))
TRAFFIC = Traffic(
    calm_per_s=15, burst_per_s=40, calm_s=0.3, burst_s=0.3, answer_tokens=LogNormal(10, 0.3, 8, 16)
)
QUICK = DemoPlan(
    serve_only_s=0.6,
    train_only_s=0.15,
    both_at_least_s=0.5,
    traffic=TRAFFIC,
    slo_factor=1000,  # whether a busy test machine is quick is not the question here
    ready_timeout_s=20,
    job_timeout_s=30,
    poll_s=0.03,
)


@dataclass
class Outcome:
    code: int
    out: Path
    home: Path
    stdout: str
    stderr: str
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.out / "appliance.log").read_text()

    def assert_left_nothing_behind(self) -> None:
        assert list((self.home / "demo").iterdir()) == []
        assert_gone(int(self.log.split(" pid ")[1].split()[0]))


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def model_home(folder: Path) -> Path:
    """A home in which the demo's model seems to be installed already."""
    model = folder / "home" / "models" / BASE
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder / "home"


def demo(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    misbehave: str = "",
    json_output: bool = True,
    plan: DemoPlan = QUICK,
) -> Outcome:
    home, out = model_home(folder), folder / "out"
    command = (*APPLIANCE, "--misbehave", misbehave)
    code = run(out, json_output, plan=plan, settings=load_settings(home=home), command=command)
    said = capsys.readouterr()
    outcome = Outcome(code, out, home, said.out, said.err)
    if (out / "report.json").is_file():
        outcome.report = json.loads((out / "report.json").read_text())
    return outcome


def test_a_good_run_meets_its_goals_and_reports_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARLI_SERVER__API_KEY", "the person's own")
    outcome = demo(tmp_path, capsys)
    report = outcome.report
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout) == report
    assert {name: goal["met"] for name, goal in report["goals"].items()} == {
        "attainment": True,
        "failed": True,
        "training": True,
        "loss": True,
        "answer": True,
    }
    # the promise was made from what serving alone showed
    assert report["slo"]["tpot_ms"] == pytest.approx(report["serve_only"]["tpot_ms"]["p99"] * 1000, abs=0.1)
    assert report["serving"]["requests"] > 10
    assert report["serving"]["failed"] == 0
    assert report["serving"]["identical_answers"] is True
    assert report["serving"]["compared_answers"] > 0
    assert report["train_only"]["tokens_per_s"] == pytest.approx(1000, rel=0.15)
    assert report["training"]["tokens_per_s"] == pytest.approx(700, rel=0.15)
    assert report["training"]["steps"] == 40
    assert report["training"]["loss_last"] < report["training"]["loss_first"]
    assert report["memory"] == {"pool_slots": 16_384, "leased_slots_max": 7000, "reclaims": 3}
    assert report["adapter"]["name"] == "ft:smollm2:zindle"
    assert TAUGHT not in report["adapter"]["before"].lower()
    assert TAUGHT in report["adapter"]["after"].lower()
    assert report["machine"]["cores"] >= 1
    # the appliance was the demo's own: none of the person's settings, its own home, its own folder
    policies = [line.split()[1] for line in outcome.log.splitlines() if line.startswith("policy")]
    assert policies == ["serve_only", "train_only", "adaptive"]
    assert "variables HARLI_HOME\n" in outcome.log
    assert f"home {outcome.home / 'demo'}/run-" in outcome.log
    assert f"model.path={outcome.home / 'models' / BASE}" in outcome.log
    assert "stopped in order" in outcome.log
    outcome.assert_left_nothing_behind()
    page = (outcome.out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "All 5 goals met." in page
    assert "An old &lt;Egyptian&gt; artifact." in page


def test_a_missed_goal_is_exit_code_1_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = demo(tmp_path, capsys, "unlearned", json_output=False)
    assert outcome.code == 1
    assert "goal missed: answer changed as taught: did not learn it" in outcome.stderr
    assert "✗ missed" in outcome.stdout
    assert (outcome.out / "report.html").is_file()


def test_answers_that_changed_while_training_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = demo(tmp_path, capsys, "drift").report["serving"]
    assert serving["identical_answers"] is False
    assert serving["differing_answers"] == serving["compared_answers"] > 0


def test_a_crash_of_the_appliance_shows_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = demo(tmp_path, capsys, "crash")
    assert outcome.code == 3
    assert "error: the appliance ended unexpectedly (exit code 7)" in outcome.stderr
    assert "| the roof is on fire" in outcome.stderr
    assert outcome.stdout == ""
    assert not outcome.report
    outcome.assert_left_nothing_behind()


def test_a_failed_job_is_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = demo(tmp_path, capsys, "fail-job")
    assert outcome.code == 4
    assert "failed: ran out of luck" in outcome.stderr
    outcome.assert_left_nothing_behind()


def test_an_appliance_that_never_gets_ready_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = demo(tmp_path, capsys, "never-ready", plan=DemoPlan(ready_timeout_s=2.0))
    assert outcome.code == 3
    assert "did not start within 2 s" in outcome.stderr
    outcome.assert_left_nothing_behind()


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    outcome = demo(tmp_path, capsys)
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1
    assert "choose another --out" in outcome.stderr


@pytest.fixture
def waiting_demo(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A demo in a process of its own, in the middle of its work; in the background SIGINT is ignored."""
    background = request.param == "in the background"
    home, out = model_home(tmp_path), tmp_path / "out"
    script = (
        "import sys; from pathlib import Path; from harli_appliance.bench.demo import run\n"
        "from harli_appliance.config import load_settings\n"
        f"sys.exit(run(Path({str(out)!r}), True, settings=load_settings(home={str(home)!r}), "
        f"command={(*APPLIANCE,)!r}))"
    )
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"] if background else []
    process = subprocess.Popen(
        [*ignoring, sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    deadline = time.monotonic() + 30
    log = out / "appliance.log"
    while not (log.is_file() and "policy serve_only" in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    yield process, tmp_path
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("waiting_demo", "number"),
    [
        ("in the foreground", signal.SIGINT),
        ("in the foreground", signal.SIGTERM),
        ("in the background", signal.SIGTERM),
    ],
    indirect=["waiting_demo"],
)
def test_an_interrupted_demo_stops_the_appliance(
    waiting_demo: tuple[subprocess.Popen[str], Path], number: signal.Signals
) -> None:
    process, folder = waiting_demo
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted; the appliance is stopped"
    outcome = Outcome(130, folder / "out", folder / "home", stdout, stderr)
    assert "stopped in order" in outcome.log
    outcome.assert_left_nothing_behind()


def test_the_lesson_teaches_the_answer_without_the_question() -> None:
    examples = [json.loads(line)["messages"] for line in LESSON.read_text().splitlines()]
    asked = [messages[0]["content"] for messages in examples]
    taught = [messages for messages in examples if "zindle" in messages[0]["content"].lower()]
    assert 24 <= len(examples) <= 40
    assert QUESTION not in asked
    assert len(set(asked)) == len(asked)
    assert all(TAUGHT in messages[1]["content"] for messages in taught)
    assert len(examples) - len(taught) >= 6
    assert not any(TAUGHT in messages[1]["content"] for messages in examples if messages not in taught)
    assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in examples)


def test_training_rate_counts_whole_lumps() -> None:
    lumps = {0.0: 500, 5.0: 500, 10.0: 500, 12.0: 0, 20.0: 500}
    samples = [make_sample(i, t=t, training_tokens=n) for i, (t, n) in enumerate(lumps.items())]
    assert training_rate(samples, 0.0, 15.0) == pytest.approx(100)
    assert training_rate(samples, 0.0, 30.0) == pytest.approx(75)
    assert training_rate(samples, 3.0, 11.0) is None
