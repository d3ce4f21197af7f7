"""Attention whose output outlives its forward pass: transformers' own "sdpa", with two arguments more.

What attention gives and the logarithms of its softmax's sums are all that its backward pass needs besides its
inputs (FlashAttention, arXiv 2205.14135, section 3.1), so where both were kept it is not computed again. The
kernel shares a K/V head among its group of query heads, where transformers would copy it for each as soon as there
is a mask. On a CPU only, with the kernel that torch takes there; elsewhere units compute it again. The other
argument is what `packed_attention` needs in place of a mask. Knows transformers and torch, not units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from harli_appliance.training.packed_attention import Packed
from harli_appliance.training.packed_attention import attend as attend_packed

BLOCK = 256
"""Half as many would make the kernel's own blocks smaller, and it slower."""

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Attended:
    """What becomes of attention's output for one window; given as `attended` to a decoder layer, which passes it
    to attention.

    Attributes:
        keep: gets the output [1, heads, n, head size] and the logarithms of the softmax's sums [1, heads, n].
        known: both, when they are known already.
    """

    keep: Callable[[Tensor, Tensor], None] | None = None
    known: tuple[Tensor, Tensor] | None = None


class _Attention(torch.autograd.Function):
    """Attention's output and the logarithms of its sums, or its gradient with both given. Computed `BLOCK` queries
    at a time, each with the keys up to its own last one: what comes later the mask hides from all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scale: float,
        known: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if known is None:
            blocks = [
                _cpu(
                    query[:, :, a:b],
                    key[:, :, :to],
                    value[:, :, :to],
                    attn_mask=mask[:, :, a:b, :to],
                    scale=scale,
                )
                for a, b, to in _blocks(query, key)
            ]
            outs, all_sums = zip(*blocks, strict=True)
            out, sums = _joined(outs), torch.cat(all_sums, 2)
        else:
            out, sums = known[0].view_as(known[0]), known[1].view_as(known[1])
        ctx.save_for_backward(query, key, value, mask, out, sums)
        ctx.scale = scale
        ctx.mark_non_differentiable(sums)
        return out, sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, sums = ctx.saved_tensors
        by_query: list[Tensor] = []
        by_key = by_value = None
        for a, b, to in reversed(_blocks(query, key)):  # the last one has all keys
            found = _cpu_backward(
                gradients[0][:, :, a:b],
                query[:, :, a:b],
                key[:, :, :to],
                value[:, :, :to],
                out[:, :, a:b],
                sums[:, :, a:b],
                0.0,
                False,
                attn_mask=mask[:, :, a:b, :to],
                scale=ctx.scale,
            )
            by_query.insert(0, found[0])
            if by_key is None or by_value is None:
                by_key, by_value = found[1:]
            else:
                by_key[:, :, :to] += found[1]
                by_value[:, :, :to] += found[2]
        return _joined(by_query), by_key, by_value, None, None, None


def _blocks(query: Tensor, key: Tensor) -> list[tuple[int, int, int]]:
    """(first query, end of the queries, end of the keys that these can see); the queries are the last tokens."""
    count, earlier = query.shape[2], key.shape[2] - query.shape[2]
    ends = [(a, min(a + BLOCK, count)) for a in range(0, count, BLOCK)]
    return [(a, b, earlier + b) for a, b in ends]


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of queries, each [1, heads, n, head size] and laid out as [1, n, heads, head size], as one such."""
    return torch.cat([block.transpose(1, 2) for block in blocks], 1).transpose(1, 2)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attended: Attended | None = None,
    packed: Packed | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if packed is not None:
        return attend_packed(query, key, value, packed, others["scaling"]), None
    if attended is None or attention_mask is None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return usual
    mask = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    out, sums = _Attention.apply(query, key, value, mask, others["scaling"], attended.known)  # type: ignore[no-untyped-call]
    if attended.keep is not None:
        attended.keep(out, sums)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("sdpa", attend)
