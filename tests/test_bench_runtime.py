"""`harli bench runtime`: goals and report; and that what it measures is what it says, on the tests' own model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harli_appliance.bench import runtime as bench
from harli_appliance.cli.main import run as harli
from tests.conftest import Serving

pytestmark = pytest.mark.filterwarnings("ignore")  # importing SGLang warns of its own affairs

TINY = {
    "overhead": {"tick_ms": 4.5, "step_ms": 4.0, "overhead_ms": 0.5, "steps": 9},
    "prefix": {"first_ms": 40.0, "second_ms": 10.0},
    "attention": {
        "ours": 6.0,
        "torch_native": 14.0,
        "plain": 4.0,
        "ratio_to_plain": 1.5,
        "torch_native_ratio_to_plain": 3.5,
        "same_tokens": 1.0,
    },
}
SMOLLM2 = {
    "attention": {"ours": 150.0, "torch_native": 210.0, "speedup": 1.4},
    "attention_short": {"ours": 100.0, "torch_native": 120.0, "speedup": 1.2},
    "few": {
        "1": {"ours_ms": 40.0, "sglang_ms": 60.0, "speedup": 1.5},
        "4": {"ours_ms": 50.0, "sglang_ms": 100.0, "speedup": 2.0},
    },
    "hotload": {"median_ms": 100.0, "longest_ms": 150.0, "load_ms": 50.0},
}


def test_the_report_has_the_promised_numbers() -> None:
    report = bench.build_report(TINY, SMOLLM2, {"cpu": "some"}, 100.0)
    assert report["overhead_ms_p50"] == 0.5
    assert report["attention"]["tiny_bs32_ratio_to_plain"] == 1.5
    assert report["attention"]["smollm2_bs16_speedup"] == 1.4
    assert report["prefix"]["ttft_ratio"] == 0.25
    assert report["projections"]["least_speedup"] == 1.5
    assert report["hotload"]["max_step_ratio"] == 1.5
    assert report["machine"] == {"cpu": "some"}
    assert all(goal["met"] for goal in report["goals"].values())


@pytest.mark.parametrize(
    ("part", "name", "value", "missed"),
    [
        ("overhead", "overhead_ms", 1.01, "overhead_ms_p50"),
        ("attention", "ratio_to_plain", 1.51, "attention.tiny_bs32_ratio_to_plain"),
        ("prefix", "second_ms", 20.1, "prefix.ttft_ratio"),
    ],
)
def test_a_goal_that_is_missed_is_told(part: str, name: str, value: float, missed: str) -> None:
    tiny: dict[str, Any] = {**TINY, part: {**TINY[part], name: value}}
    goals = bench.build_report(tiny, SMOLLM2, {}, 1.0)["goals"]
    assert [key for key, goal in goals.items() if not goal["met"]] == [missed]


@pytest.fixture
def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> Callable[[dict[str, Any], int], None]:
    """Children that say what they are told to, instead of measuring."""
    monkeypatch.setattr(bench, "resolve_model", lambda name, settings: tiny_model)
    monkeypatch.setenv("HARLI_HOME", str(tmp_path / "home"))

    def say(smollm2: dict[str, Any], status: int = 0) -> None:
        said = tmp_path / "said.json"
        said.write_text(json.dumps({"tiny": TINY, "smollm2": smollm2}))
        program = (
            "import json, sys; print('noise'); print('cause', file=sys.stderr); "
            f"print(json.dumps(json.load(open({str(said)!r}))[sys.argv[1]])); sys.exit({status})"
        )
        monkeypatch.setattr(bench, "CHILD", (sys.executable, "-c", program))

    return say


def test_it_writes_the_report_and_tells_goals(
    measured: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(SMOLLM2)
    assert harli(["bench", "runtime", "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "runtime.json").read_text())
    assert written["hotload"]["max_step_ratio"] == 1.5
    out = capsys.readouterr().out
    assert "torch_native 14.00 ms" in " ".join(out.split())
    assert "not met" not in out

    measured({**SMOLLM2, "attention": {"ours": 200.0, "torch_native": 210.0, "speedup": 1.05}})
    assert harli(["bench", "runtime", "--out", str(tmp_path / "out"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["goals"]["attention.smollm2_bs16_speedup"]["met"] is False


def test_a_measurement_that_dies_says_why(
    measured: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(SMOLLM2, 3)
    assert harli(["bench", "runtime", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "status 3" in said
    assert "cause" in said
    assert not (tmp_path / "runtime.json").exists()


def test_plain_decoding_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from harli_appliance.bench.runtime_plain import PlainDecoder, write_tiny_model
    from harli_appliance.bench.runtime_rig import prompt

    write_tiny_model(tmp_path)
    prompts = [prompt(1, 5), prompt(2, 17), prompt(3, 1)]
    plain = PlainDecoder(tmp_path, prompts, 40)
    for _ in range(11):
        plain.step()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    for at, tokens in enumerate(prompts):
        out = reference.generate(
            torch.tensor([tokens]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        assert [step[at] for step in plain.tokens] == out[0, len(tokens) :].tolist()


@pytest.fixture
def rig(serving: Serving) -> Any:
    from harli_appliance.bench.runtime_rig import Bench

    return Bench(serving.runtime, serving.lane, serving.folder)


def test_both_attentions_take_turns(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from harli_appliance.bench import runtime_parts
    from harli_appliance.runtime.attention_cpu import CpuAttentionBackend

    runner = rig.runtime.scheduler.tp_worker.model_runner
    used: list[bool] = []
    take = runtime_parts._median_ms

    def watched(step: Callable[[], object], count: int) -> float:
        used.append(isinstance(runner.attn_backend, CpuAttentionBackend))
        return take(step, count)

    monkeypatch.setattr(runtime_parts, "_median_ms", watched)
    found = runtime_parts.attention_steps(rig, requests=3, rounds=2)
    assert used == [True, False, True, False]
    assert found.keys() == {"ours", "torch_native", "speedup"}
    assert isinstance(runner.attn_backend, CpuAttentionBackend)


async def test_a_tick_is_median_ms_against_sglangs_own_step(rig: Any) -> None:
    from harli_appliance.bench.runtime_parts import overhead

    found = await overhead(rig, requests=3, answer=12)
    assert found["steps"] >= 8
    assert 0 < found["step_ms"] < found["tick_ms"]
    scheduler = rig.runtime.scheduler
    assert "run_batch" not in vars(scheduler)  # nothing of the stopwatch is left


async def test_the_second_of_two_prompts_is_the_shared_one(rig: Any) -> None:
    """Counted, not timed: the second prompt computes only what is its own."""
    from harli_appliance.bench.runtime_parts import prefix
    from harli_appliance.runtime.measuring import timed_steps

    with timed_steps(rig.runtime) as steps:
        found = await prefix(rig, shared=130, pairs=1)
    assert found.keys() == {"first_ms", "second_ms"}
    prefills = sum(not step.decode for step in steps)
    assert prefills == 3 + 3 + 1  # chunks of 64: to warm up, the first, the second


async def test_adapters_are_loaded_while_requests_decode(rig: Any, tmp_path: Path) -> None:
    from harli_appliance.bench.runtime_parts import hotload

    found = await hotload(rig, tmp_path / "adapter", requests=2, loads=1, rank=4)
    assert found["longest_ms"] >= found["median_ms"] > 0
    assert found["load_ms"] > 0


def test_both_orders_of_projection_take_turns(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from harli_appliance.bench import runtime_parts
    from harli_appliance.runtime.projections_cpu import FewRowsLinear

    methods = [getattr(module, "quant_method", None) for module in rig.runtime.model.modules()]
    linears = [method for method in methods if isinstance(method, FewRowsLinear)]
    chosen = frozenset({1, 2})
    for method in linears:
        monkeypatch.setattr(method, "columns", chosen)
    used: list[bool] = []
    take = runtime_parts._median_ms

    def watched(step: Callable[[], object], count: int) -> float:
        used.append(all(method.columns == chosen for method in linears))
        assert used[-1] or not any(method.columns for method in linears)
        return take(step, count)

    monkeypatch.setattr(runtime_parts, "_median_ms", watched)
    monkeypatch.setattr(runtime_parts, "FEW", (2,))
    found = runtime_parts.few_steps(rig, rounds=2)
    assert used == [True, False, True, False]
    assert found["2"].keys() == {"ours_ms", "sglang_ms", "speedup"}
    assert all(method.columns == chosen for method in linears)
