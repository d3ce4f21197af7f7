"""Dropout by token: the promised share, drawn anew everywhere, the same however the windows are cut."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from harli_appliance.training.adapter import TARGETS
from harli_appliance.training.dropout import DropoutStream, TokenDropout, sequence_key, token_keys
from tests.test_units import a_trained_adapter

TOKENS, FEATURES = 400, 96


def mask(p: float, key: int = 7, salt: int = 0, cuts: tuple[int, ...] = ()) -> Tensor:
    """Which of [TOKENS, FEATURES] are kept, 1 or 0."""
    stream = DropoutStream()
    dropout = TokenDropout(p, salt, stream)
    parts = []
    for start, stop in itertools.pairwise((0, *cuts, TOKENS)):
        stream.rows = token_keys(key, start, stop)
        parts.append(dropout(torch.ones(1, stop - start, FEATURES))[0])
    kept = torch.cat(parts)
    assert torch.allclose(kept[kept > 0], torch.tensor(1 / (1 - p))), "what is kept is scaled up"
    return (kept > 0).float()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_promised_share_is_dropped_of_every_token_and_feature(p: float) -> None:
    dropped = 1 - mask(p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean().item() - p) < 4 * sigma / (TOKENS * FEATURES) ** 0.5
    assert (dropped.mean(0) - p).abs().max().item() < 5 * sigma / TOKENS**0.5
    assert (dropped.mean(1) - p).abs().max().item() < 5 * sigma / FEATURES**0.5


@pytest.mark.parametrize("other", [{"key": 8}, {"salt": 1}, {"key": 7 + 2**31}])
def test_other_sequences_and_modules_drop_independently(other: dict[str, int]) -> None:
    agree = (mask(0.5) == mask(0.5, **other)).float().mean().item()
    assert abs(agree - 0.5) < 4 * 0.5 / (TOKENS * FEATURES) ** 0.5


@pytest.mark.parametrize("shift", [1, 2, 16])
def test_neighbours_drop_independently(shift: int) -> None:
    kept = mask(0.5)
    for one, two in ((kept[shift:], kept[:-shift]), (kept[:, shift:], kept[:, :-shift])):
        agree = (one == two).float().mean().item()
        assert abs(agree - 0.5) < 4 * 0.5 / one.numel() ** 0.5


def test_windows_do_not_matter() -> None:
    assert torch.equal(mask(0.3), mask(0.3, cuts=(1, 17, 300)))


def test_outside_of_learning_nothing_is_dropped() -> None:
    x = torch.randn(1, 3, 4)
    assert torch.equal(TokenDropout(0.5, 0, DropoutStream())(x), x)


def test_each_sequence_of_a_job_has_a_key_of_its_own() -> None:
    keys = {sequence_key(*place) for place in itertools.product(range(5), range(20), range(5))}
    assert len(keys) == 500
    assert sequence_key(3, 4, 5) == sequence_key(3, 4, 5)


def test_no_two_modules_of_an_adapter_drop_alike(reference: Any) -> None:
    backbone, adapter = a_trained_adapter(reference, dropout=0.5)
    modules = [module for module in adapter.peft_model.modules() if isinstance(module, TokenDropout)]
    assert len(modules) == len(TARGETS) * len(backbone.layers)
    with adapter.dropping(1, 0, 8):
        masks = {tuple(module(torch.ones(1, 8, 32)).flatten().tolist()) for module in modules}
    assert len(masks) == len(modules)


def test_a_saved_adapter_does_what_was_trained(reference: Any, tmp_path: Path) -> None:
    """By PEFT's reading of the file, and with SGLang's scale, which is alpha / rank for every adapter."""
    _, adapter = a_trained_adapter(reference, rslora=True, dropout=0.3)
    for _ in range(2):  # saving changes nothing
        adapter.save(tmp_path)
    ids = torch.arange(10, 40)[None]
    served = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(served(ids).logits, adapter.peft_model(ids).logits, atol=1e-5)
        assert not torch.allclose(served(ids).logits, reference(ids).logits, atol=1e-3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / 4**0.5)
    assert config["use_rslora"] is False
