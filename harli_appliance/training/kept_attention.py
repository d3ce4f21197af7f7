"""Attention whose output outlives its forward pass: transformers' own "sdpa", with one argument more.

What attention gives and the logarithms of its softmax's sums are all that its backward pass needs besides its
inputs (FlashAttention, arXiv 2205.14135, section 3.1), so where both were kept it is not computed again. The
kernel shares a K/V head among its group of query heads, where transformers would copy it for each as soon as there
is a mask. On a CPU only, with the kernel that torch takes there; elsewhere units compute it again. Knows
transformers and torch, not units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


class _Known(torch.autograd.Function):
    """Attention's gradient, with its output given."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scale: float,
        out: Tensor,
        sums: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask, out, sums)
        ctx.scale = scale
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, sums = ctx.saved_tensors
        by_inputs = _cpu_backward(
            gradients[0], query, key, value, out, sums, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        return *by_inputs, None, None, None, None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attended: Attended | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if attended is None or attention_mask is None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return usual
    mask = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    if attended.known is not None:
        out: Tensor = _Known.apply(query, key, value, mask, others["scaling"], *attended.known)  # type: ignore[no-untyped-call]
    else:
        out, sums = _cpu(query, key, value, attn_mask=mask, scale=others["scaling"])
        if attended.keep is not None:
            attended.keep(out, sums)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("sdpa", _attend)
