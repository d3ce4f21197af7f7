"""Computing a layer again only as far as its gradients need it.

The gradients of a linear projection y = W x are W^T dy and dy x^T: y itself is not in them. Where nothing after a
projection needs y's value either, the backward pass leaves W x out: the layer's last projection, whose output only
joins the residual stream, and those of K and V, whose values lie in the cache. In SmolLM2-135M they are 31% of a
layer's multiplications, and every gradient stays the same bit for bit. Knows modules and autograd, not units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

VALUES_NEEDED_AFTER = {
    "down_proj": ("post_feedforward_layernorm",),
    "k_proj": ("k_norm", "q_norm"),
    "v_proj": ("v_norm",),
}
"""Projections that can be left out of a layer, and the modules whose gradients would need their values."""


class _Unvalued(torch.autograd.Function):
    """A linear projection with its gradient and without its value; [..., in] to [..., out] of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(1).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None


class _Valued(torch.autograd.Function):
    """The value of one tensor with the gradient of another of its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def valued(value: Tensor, graph: Tensor) -> Tensor:
    """`value`, whose gradient goes to `graph`."""
    out: Tensor = _Valued.apply(value, graph)  # type: ignore[no-untyped-call]
    return out


def _unvalued(projection: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _Unvalued.apply(x, projection.weight)  # type: ignore[no-untyped-call]
    return out


def projections(layer: nn.Module, name: str) -> list[nn.Linear]:
    """The layer's own projections of that name, without what an adapter adds to them."""
    found = []
    for path, module in layer.named_modules():
        if path.rpartition(".")[2] == name:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if type(base) is nn.Linear:
                found.append(base)
    return found


def unneeded(layer: nn.Module) -> list[nn.Linear]:
    """The projections of a decoder layer whose values its gradients do not need.

    Adapters other than LoRA's own sum (DoRA, IA3) scale the base layer's output, so their gradients need it.
    """
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    found = []
    for name, module in layer.named_modules():
        needed = VALUES_NEEDED_AFTER.get(name.rpartition(".")[2])
        if needed is None or not names.isdisjoint(needed):
            continue
        if isinstance(module, BaseTunerLayer):
            if not _only_adds(module):
                continue
            module = module.get_base_layer()
        if type(module) is nn.Linear and not module.weight.requires_grad:
            found.append(module)
    return found


def _only_adds(tuner: BaseTunerLayer) -> bool:
    return isinstance(tuner, LoraLayer) and not any(tuner.use_dora.values())


@contextmanager
def left_out(without: list[nn.Linear]) -> Iterator[None]:
    """While a layer is computed and the values of some of its projections are not needed."""
    for projection in without:
        projection.forward = partial(_unvalued, projection)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for projection in without:
            del projection.forward
