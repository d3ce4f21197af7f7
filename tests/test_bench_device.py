"""`harli bench device`: its parts that a CPU has, the guard around sections, and the CUDA rig on fakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harli_appliance.bench import device, random_model
from harli_appliance.bench.device_finetune import Finetuning
from harli_appliance.bench.device_model import DeviceModel
from harli_appliance.bench.device_rig import CpuRig
from harli_appliance.bench.device_shapes import SHAPES
from harli_appliance.bench.device_sharing import Sharing, Sizes
from harli_appliance.bench.exact_prompts import WORDS, one_token_words
from harli_appliance.bench.sections import run_sections
from harli_appliance.device.partition import cpu_partition

SMALL = Sizes(1 << 20, (32, 32, 32), 2)


def test_a_section_that_fails_does_not_lose_the_others(tmp_path: Path) -> None:
    out = tmp_path / "new" / "found.json"
    seen: list[Any] = []

    def broken() -> None:
        seen.append(json.loads(out.read_text())["sections"])
        raise RuntimeError("the device fell off the bus")

    sections = {"first": lambda: {"a": 1}, "second": broken, "third": lambda: {"b": 2}}
    report = run_sections(sections, out, {"machine": "m"}, budget_s=60)
    assert json.loads(out.read_text()) == report
    assert seen[0]["first"]["data"] == {"a": 1}, "written before the next section begins"
    assert report["machine"] == "m"
    assert [section["ok"] for section in report["sections"].values()] == [True, False, True]
    assert report["sections"]["second"]["error"] == "RuntimeError: the device fell off the bus"


def test_no_section_begins_when_time_is_over(tmp_path: Path) -> None:
    report = run_sections({"late": lambda: 1}, tmp_path / "r.json", {}, budget_s=-1)
    assert report["sections"]["late"]["ok"] is False
    assert "left out" in report["sections"]["late"]["error"]


@pytest.fixture
def rig() -> Any:
    made = CpuRig(cpu_partition())
    yield made
    made.close()


def test_bandwidth_and_matmul_of_every_place(rig: CpuRig) -> None:
    sharing = Sharing(rig, SMALL)
    solo = sharing.solo()
    assert set(solo) == {"inference", "training"}
    assert all(place["read_gb_s"] > 0 for place in solo.values())
    both = sharing.corun()["lanes"]
    assert both["read_slowdown"] > 0
    assert both["matmul_slowdown"] > 0


def test_work_beside_goes_on_for_as_long_as_it_is_measured_beside(rig: CpuRig) -> None:
    way, calls = rig.ways[0], [0]

    def other() -> None:
        calls[0] += 1

    mine, theirs = rig.together(way.inference, lambda: torch.ones(8), 3, way.training, other)
    assert calls[0] >= 1
    assert mine > 0 < theirs
    before = calls[0]
    rig.once(way.training, lambda: None)
    assert calls[0] == before, "the other side has ended"


def test_decoding_and_finetuning_are_told_against_what_the_device_can_do(rig: CpuRig) -> None:
    shapes = SHAPES["tiny"]
    model = DeviceModel(rig, shapes)
    assert model.parameters == 4 * (128 * (128 + 32 + 32 + 128 + 3 * 352) + 2 * 128) + 128 + 1024 * 128
    decoded = model.decode(rig.whole, bandwidth=1e9)
    assert set(decoded) == {"1", "4"}
    # 4 layers x K and V x batch x context x kv width of 32, and the weights, 4 bytes each.
    floor = 4e3 * (model.parameters + 4 * 2 * 4 * 64 * 32) / 1e9
    assert decoded["4"]["floor_ms"] == pytest.approx(floor, rel=1e-2)
    finetuning = Finetuning(rig, model, shapes, rig.ways[0].training)
    found = finetuning.measure(matmul_rate=1e12)
    finetuning.close()
    assert set(found["unit_ms"]) == {"forward", "loss", "backward"}
    assert 0 < found["reclaim_median_ms"] <= found["reclaim_slowest_ms"]
    expected = 6 * model.parameters * found["tokens_per_s"] / 1e12
    assert found["of_matmul_rate"] == pytest.approx(expected, abs=1e-4)


def test_one_call_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CPU_SIZES", SMALL)
    asked = [
        "--out",
        str(tmp_path),
        "--shapes",
        "tiny",
        "--budget",
        "60",
        "--only",
        "device",
        "--only",
        "solo",
    ]
    assert device.main(asked) == 0
    report = json.loads((tmp_path / "device.json").read_text())
    assert set(report["sections"]) == {"device", "solo"}
    assert report["shapes"] == "tiny"
    assert "read_gb_s" in capsys.readouterr().out
    assert device.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sections"]["solo"]["ok"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--shapes", "huge"], "no shapes 'huge'; there are tiny"),
        (["--only", "overlap"], "no section 'overlap'"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device.main(["--out", str(tmp_path), "--budget", "60", *wrong]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_random_model_is_a_whole_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harli_appliance.models.size import model_size

    assert random_model.main(["tiny", str(tmp_path)]) == 0
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    size = model_size(tmp_path)
    assert size is not None
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    assert len(one_token_words(tmp_path)) == WORDS, "enough to make prompts of"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == SHAPES["tiny"].vocabulary
    first = range(tokenizer.convert_tokens_to_ids("<s>"))
    assert first, "some are neither bytes nor words"
    assert all(tokenizer.decode([token]).strip() for token in first), "an answer has text at every token"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    asked = [{"role": "user", "content": "ab cd"}]
    answered = [*asked, {"role": "assistant", "content": "ef gh"}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    after = tokenizer.apply_chat_template(answered, return_dict=False)
    assert after[: len(before)] == before, "an answer can be trained on"
    tokens = tokenizer("harli").input_ids
    assert model(torch.tensor([tokens])).logits.isfinite().all()
