"""Computing a layer again only as far as its gradients need it, and as its values are not known.

The gradients of a linear projection y = W x are W^T dy and dy x^T: y itself is not in them. Where nothing after a
projection needs y's value either, the backward pass leaves W x out: the layer's last projection, whose output only
joins the residual stream, and those of K and V, whose values lie in the cache. In SmolLM2-135M they are 31% of a
layer's multiplications, and every gradient stays the same bit for bit. A value that was kept from the forward pass
takes the place of W x. Knows modules and autograd, not units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


class _Projected(torch.autograd.Function):
    """A linear projection's gradient, with a value that is not computed from x [..., in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None


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


def without_value(projection: nn.Linear, x: Tensor) -> Tensor:
    """Zeros of shape [..., out] in place of W x, with its gradient."""
    return with_value(projection, x, x.new_zeros(1).expand(*x.shape[:-1], len(projection.weight)))


def with_value(projection: nn.Linear, x: Tensor, value: Tensor) -> Tensor:
    """`value`, which is W x, with its gradient."""
    out: Tensor = _Projected.apply(x, projection.weight, value)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class Projections:
    """A decoder layer's projections that are not trained, by what computing it again needs of them.

    Attributes:
        queries: those of the queries, which K and V do not need.
        unneeded: those whose values the gradients do not need.
        kept: the others, whose values may be kept from the forward pass.
    """

    queries: tuple[nn.Linear, ...]
    unneeded: tuple[nn.Linear, ...]
    kept: tuple[nn.Linear, ...]


def projections(layer: nn.Module) -> Projections:
    """Of a layer with the adapter that is on it now; without what the adapter adds to them."""
    without = _unneeded(layer)
    frozen = (module for module in layer.modules() if isinstance(module, nn.Linear) and _is_frozen(module))
    kept = [projection for projection in frozen if projection not in without]
    return Projections(tuple(_named(layer, "q_proj")), tuple(without), tuple(kept))


def _is_frozen(module: nn.Linear) -> bool:
    return type(module) is nn.Linear and not module.weight.requires_grad


def _named(layer: nn.Module, name: str) -> list[nn.Linear]:
    """The layer's own projections of that name, without what an adapter adds to them."""
    found = []
    for path, module in layer.named_modules():
        if path.rpartition(".")[2] == name:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if type(base) is nn.Linear:
                found.append(base)
    return found


def _unneeded(layer: nn.Module) -> list[nn.Linear]:
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
        if isinstance(module, nn.Linear) and _is_frozen(module):
            found.append(module)
    return found


def _only_adds(tuner: BaseTunerLayer) -> bool:
    return isinstance(tuner, LoraLayer) and not any(tuner.use_dora.values())


def left_out(without: Iterable[nn.Linear]) -> Mapping[nn.Linear, Callable[[Tensor], Tensor]]:
    """For `replaced`: projections whose values are not needed."""
    return {projection: partial(without_value, projection) for projection in without}


@contextmanager
def replaced(forwards: Mapping[nn.Linear, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While a layer is computed and some of its projections are computed by other functions of their input."""
    for projection, forward in forwards.items():
        projection.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for projection in forwards:
            del projection.forward
