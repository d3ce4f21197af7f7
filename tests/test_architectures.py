"""Architectures on real SGLang: same weights, logits, tokens and gradients; what is not listed is only served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import GraniteConfig

from harli_appliance.errors import ConfigError
from harli_appliance.models.architectures import FINETUNABLE
from harli_appliance.runtime.weights import shared_model
from tests.architectures import COMMON, CONFIGS, make
from tests.conftest import Serving
from tests.test_appliance import ask, finetune, running
from tests.test_coserving import lesson  # noqa: F401  a fixture

Findings = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def findings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What `architecture_child` found out about each architecture."""
    root = tmp_path_factory.mktemp("architectures")
    folders = [make(config(), root / name, tiny_model) for name, config in CONFIGS.items()]
    child = subprocess.run(
        [sys.executable, "-m", "tests.architecture_child", *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    made = [folder for folder in folders if (folder / "findings.json").is_file()]
    assert made == folders, child.stderr[-5000:]
    return {folder.name: json.loads((folder / "findings.json").read_text()) for folder in folders}


def test_every_architecture_that_can_be_finetuned_is_tested(findings: Findings) -> None:
    assert {found["architecture"] for found in findings.values()} == FINETUNABLE


@pytest.mark.parametrize("name", CONFIGS)
class TestArchitecture:
    def test_the_twin_copies_nothing_and_computes_the_same(self, findings: Findings, name: str) -> None:
        assert findings[name]["copied_bytes"] == 0
        assert findings[name]["logits_difference"] == 0.0

    def test_served_tokens_are_greedy(self, findings: Findings, name: str) -> None:
        assert findings[name]["wrong"] == []
        assert findings[name]["distinct_tokens"] > 10, "too dull a model to tell anything"

    def test_gradients_equal_backpropagation(self, findings: Findings, name: str) -> None:
        assert max(findings[name]["gradient_errors"]) <= 1e-5

    def test_a_trained_adapter_is_served_as_peft_computes_it(self, findings: Findings, name: str) -> None:
        assert findings[name]["wrong_tuned"] == []
        assert findings[name]["wrong_beside_adapter"] == []
        assert findings[name]["tuned_differs"] >= 3, "training must have changed answers"

    def test_every_slot_is_free_at_the_end(self, findings: Findings, name: str) -> None:
        assert findings[name]["slots_serving"] == 0


def test_a_model_that_sglang_does_not_load_whole_is_refused(serving: Serving, tmp_path: Path) -> None:
    """SGLang serves a Llama with biases in its MLP as if it had none."""
    config = json.loads((serving.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_bias": True}))
    with pytest.raises(ConfigError, match=r"leaves model\.layers\.0\.mlp\.gate_proj\.bias"):
        shared_model(serving.runtime.model, tmp_path)


def test_an_architecture_outside_the_list_is_served_and_refused_for_finetuning_by_name(
    tiny_model: Path,
    lesson: Path,
    tmp_path: Path,
) -> None:
    folder = make(GraniteConfig(**COMMON), tmp_path / "granite", tiny_model)
    with running(tmp_path / "home", folder) as process:
        assert ask(process.client)
        with pytest.raises(
            openai.BadRequestError, match="GraniteForCausalLM can be served but not finetuned"
        ):
            finetune(process.client, lesson, epochs=1)
