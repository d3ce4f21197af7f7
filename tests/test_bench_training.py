"""`harli bench training`: goals and report; and that contenders compute the same, on the tests' own model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harli_appliance.bench import training as bench
from harli_appliance.cli.main import run as harli

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own affairs

SHORT = {
    name: {"peak_mib": peak, "formula_mib": 112.5, "loss": 13.25}
    for name, peak in {"ours": 250.0, "spared": 900.0, "checkpointing": 1000.0, "plain": 2500.0}.items()
}
LONG = {"ours": {"peak_mib": 720.0, "formula_mib": 450.0, "loss": 13.5}}
SECONDS = {
    "ours": [12.0, 22.0, 18.0],
    "spared": [10.0, 20.0, 11.0],
    "checkpointing": [16.0, 16.0, 16.0],
    "plain": [12.0, 24.2, 9.0],
}
"""Of three rounds: the second on a slower machine, in the third only one of them."""


def report(short: Any = SHORT, long: Any = LONG, seconds: Any = SECONDS) -> dict[str, Any]:
    return bench.build_report(short, long, seconds, {"cpu": "some"}, 100.0)


def test_the_report_has_the_promised_numbers() -> None:
    made = report()
    assert made["seq_1024"]["peak_ratio_plain"] == 0.1
    assert made["seq_1024"]["peak_ratio_checkpointing"] == 0.25
    assert made["seq_1024"]["speed_ratio_plain"] == 1.2
    assert made["seq_1024"]["least_memory"]["speed_ratio_plain"] == 1.0
    assert made["seq_1024"]["idle_slots"]["peak_ratio_plain"] == 0.36
    assert made["seq_1024"]["tokens_per_s"]["spared"] == pytest.approx(1024 / 11, abs=1e-3)
    assert made["seq_1024"]["step_s"] == SECONDS
    assert made["seq_4096"]["peak_ratio_formula"] == 1.6
    assert made["seq_4096"]["peak_ratio_plain"] is None
    assert made["machine"] == {"cpu": "some"}
    assert all(goal["met"] for goal in made["goals"].values())


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"short": {**SHORT, "ours": {**SHORT["ours"], "peak_mib": 251.0}}}, "seq_1024.peak_ratio_plain"),
        (
            {"short": {**SHORT, "checkpointing": {**SHORT["ours"], "peak_mib": 740.0}}},
            "seq_1024.peak_ratio_checkpointing",
        ),
        ({"seconds": {**SECONDS, "spared": [12.1, 24.3, 8.0]}}, "seq_1024.speed_ratio_plain"),
        ({"long": {"ours": {**LONG["ours"], "peak_mib": 901.0}}}, "seq_4096.peak_ratio_formula"),
        ({"short": {**SHORT, "ours": {**SHORT["ours"], "peak_mib": 170.0}}}, "seq_4096.growth"),
    ],
)
def test_a_goal_that_is_missed_is_told(changes: dict[str, Any], missed: str) -> None:
    goals = report(**changes)["goals"]
    assert [key for key, goal in goals.items() if not goal["met"]] == [missed]


@pytest.fixture
def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> Callable[[dict[str, list[float]]], None]:
    """Children that say what they are told to, instead of measuring."""
    monkeypatch.setattr(bench, "resolve_model", lambda name, settings: tiny_model)
    monkeypatch.setenv("HARLI_HOME", str(tmp_path / "home"))
    peaks = {"1024": SHORT, "4096": {**SHORT, **LONG}}

    def say(seconds: dict[str, list[float]]) -> None:
        program = (
            "import json, sys; part, _, tokens = sys.argv[1:]; "
            f"print(json.dumps({seconds!r} if part == 'speed' else {peaks!r}[tokens][part]))"
        )
        monkeypatch.setattr(bench, "CHILD", (sys.executable, "-c", program))

    return say


def test_it_writes_the_report_and_tells_goals(
    measured: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured(SECONDS)
    monkeypatch.setattr(bench, "available_mib", lambda: 1e6)
    assert harli(["bench", "training", "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["seq_4096"]["peak_mib"] == {"ours": 720.0, "checkpointing": 1000.0, "plain": 2500.0}
    assert "not met" not in capsys.readouterr().out
    measured({**SECONDS, "spared": [20.0, 20.0, 30.0]})
    monkeypatch.setattr(bench, "available_mib", lambda: 1400.0)
    assert harli(["bench", "training", "--out", str(tmp_path / "out"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["goals"]["seq_1024.speed_ratio_plain"]["met"] is False
    assert told["seq_4096"]["peak_mib"].keys() == {"ours"}, "others would not have had room"


def test_contenders_compute_the_same_loss_step_after_step(tiny_model: Path) -> None:
    from harli_appliance.bench import training_parts

    losses = {}
    for name, build in training_parts.CONTENDERS.items():
        model = training_parts._load(tiny_model)
        torch.manual_seed(1)  # PEFT draws A from it
        contender = build(model, training_parts._tokens(model, 100))
        losses[name] = [contender.step() for _ in range(2)]
    assert losses["plain"] == pytest.approx(losses["checkpointing"], rel=1e-6)
    assert losses["ours"] == losses["spared"], "bit for bit"
    assert losses["ours"][0] == pytest.approx(losses["plain"][0], rel=1e-5)
    assert all(second < first for first, second in losses.values())


def test_memory_is_what_training_adds_to_the_model(tiny_model: Path) -> None:
    from harli_appliance.bench import training_parts

    found = training_parts.memory(tiny_model, "ours", 600)
    layers = training_parts.Backbone(training_parts._load(tiny_model))
    kept = 600 * len(layers.layers) * (layers.hidden_size + 2 * layers.kv_width) * 4 / 2**20
    assert found["formula_mib"] == pytest.approx(kept)
    assert found["peak_mib"] > kept


class Noted:
    def __init__(self, name: str, contender: Any, steps: list[str]) -> None:
        self._name, self._contender, self._steps = name, contender, steps

    def step(self) -> float:
        self._steps.append(self._name)
        return float(self._contender.step())


def test_speed_takes_turns(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harli_appliance.bench import training_parts

    steps: list[str] = []
    for name, build in training_parts.CONTENDERS.items():
        noted = lambda *args, name=name, build=build: Noted(name, build(*args), steps)  # noqa: E731
        monkeypatch.setitem(training_parts.CONTENDERS, name, noted)
    found = training_parts.speed(tiny_model, 32, rounds=2)
    assert found.keys() == training_parts.CONTENDERS.keys()
    assert all(len(taken) == 2 and min(taken) > 0 for taken in found.values())
    assert steps == 3 * ["plain", "spared", "ours", "checkpointing"], "a first round is not told"
