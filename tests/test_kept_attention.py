"""Attention whose output can be kept: the values and gradients of transformers' own, cut into blocks or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from harli_appliance.training import kept_attention
from harli_appliance.training.kept_attention import Attended

HEADS, KV_HEADS, HEAD_SIZE = 6, 2, 8
EARLIER, COUNT = 7, 13
"""Tokens of earlier windows, and of this one."""


def a_window() -> tuple[list[Tensor], Tensor]:
    """Query, key, value, and what the layer may see: two examples are packed, the second begins at token 10."""
    generator = torch.Generator().manual_seed(3)
    end = EARLIER + COUNT
    shapes = ((HEADS, COUNT), (KV_HEADS, end), (KV_HEADS, end))
    inputs = [
        torch.randn(1, tokens, heads, HEAD_SIZE, generator=generator).transpose(1, 2)
        for heads, tokens in shapes
    ]
    starts = torch.where(torch.arange(end) < 10, 0, 10)
    keys, queries = torch.arange(end)[None], torch.arange(EARLIER, end)[:, None]
    return inputs, ((keys <= queries) & (keys >= starts[EARLIER:, None]))[None, None]


def attention(attended: Attended | None) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    inputs, seen = a_window()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=True)
    more: dict[str, Any] = {} if attended is None else {"attended": attended}
    attend = AttentionInterface()["sdpa"]
    out, _ = attend(module, *leaves, seen, scaling=HEAD_SIZE**-0.5, dropout=0.0, **more)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("block", [4, 5, COUNT, 256])
def test_values_and_gradients_are_those_of_transformers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_attention, "BLOCK", block)
    for found, wanted in zip(attention(Attended()), attention(None), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [4, 256])
def test_what_was_kept_gives_the_same_gradients_bit_for_bit(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_attention, "BLOCK", block)
    kept: list[Tensor] = []
    wanted = attention(Attended(keep=lambda out, sums: kept.extend((out.clone(), sums.clone()))))
    found = attention(Attended(known=(kept[0], kept[1])))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
