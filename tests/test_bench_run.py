"""`harli bench run` from flags to report, on real SGLang, with and without HTTP; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harli_appliance.bench.compare import run
from harli_appliance.bench.compare_plan import ComparePlan, Replay, SloAsked
from harli_appliance.bench.engine_process import refusal_of
from harli_appliance.cli import main
from harli_appliance.config import Settings
from harli_appliance.errors import ApplianceUnavailable, HarliError


@pytest.mark.parametrize("replay", ["engine", "http"])
def test_policies_are_compared_on_real_sglang(
    replay: Replay, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = ComparePlan(
        policies=("adaptive", "serve_only"),
        slos=(SloAsked(label="30s", tpot_ms=30_000.0),),
        model=str(tiny_model),
        replay=replay,
        ttft_ms=60_000.0,
        loads=(50,),
        repetitions=1,
        seconds=2.0,
        lead_s=0.3,
        light_requests=2,
        train_alone_s=0.3,
        shortest_rung_s=0.5,
        longest_rung_s=0.5,
        most_rungs=1,
        min_output_tokens=2,
        max_output_tokens=8,
        sequence_tokens=64,
    )
    out = tmp_path / "out"
    code = run(
        plan, out, resume=False, json_output=True, typed="harli bench run", settings=Settings(home=tmp_path)
    )
    printed, told = capfd.readouterr()
    assert "Runs" in told
    report = json.loads((out / "report.json").read_text())
    assert json.loads(printed) == report
    cells = {name: report["policies"][name]["50"] for name in plan.policies}
    for cell in cells.values():
        assert cell["attainment"] == 1.0
        assert cell["requests"] >= 1
    assert cells["serve_only"]["finetune_tokens_per_s"] == 0.0
    assert cells["adaptive"]["finetune_tokens_per_s"] > 0.0
    assert report["goals"]
    assert code == int(not all(goal["met"] for goal in report["goals"].values()))
    assert not list((tmp_path / "bench").iterdir())  # the appliance's own folder is gone
    # Everything is there already: no appliance is started again.
    (tmp_path / "bench").rmdir()
    assert run(plan, out, resume=True, json_output=False, typed="harli bench run") == code
    assert "adaptive" in capfd.readouterr().out
    assert not (tmp_path / "bench").exists()


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main.run(["bench", "run", *arguments]) == 2
    printed, told = capsys.readouterr()
    assert printed == ""
    assert told.count("\n") == 1
    return told


def test_what_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "choose from adaptive" in refusal(["--policies", "magic"], capsys)
    assert "1.5x" in refusal(["--slo-tpot", "fast"], capsys)
    assert "0.3,0.6,0.9" in refusal(["--loads", "30"], capsys)
    assert "engine or http" in refusal(["--replay", "ftp"], capsys)
    assert "cannot be read" in refusal(["--trace", "no.csv"], capsys)
    (tmp_path / "bad.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,4\n2023-11-16 18:15:50,many,4\n"
    )
    assert "row 3: 'many' is no number" in refusal(["--trace", "bad.csv"], capsys)
    assert not (tmp_path / "bench-report").exists()


def test_an_engine_that_cannot_start_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    arguments = ["bench", "run", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert main.run(arguments) != 0
    told = capsys.readouterr().err
    assert "config.json" in told


def test_the_childs_error_keeps_its_exit_code() -> None:
    error = refusal_of({"error": "gone", "exit_code": 3})
    assert isinstance(error, ApplianceUnavailable)
    assert (error.message, error.exit_code) == ("gone", 3)
    assert type(refusal_of({"error": "odd", "exit_code": 99})) is HarliError
