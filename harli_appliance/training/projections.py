"""A decoder layer's projections, computed no further than a pass over the layer needs them.

The gradients of a linear projection y = W x are W^T dy and dy x^T: y itself is not in them. Where nothing after a
projection needs y's value either, the backward pass leaves W x out: the layer's last projection, whose output only
joins the residual stream, and those of K and V, whose values lie in the cache. In SmolLM2-135M they are 31% of a
layer's multiplications. A value that was kept from the forward pass takes the place of W x. What LoRA adds is
part of the projection, so that it is spared too, and added in one pass. Every gradient stays the same bit for bit.
Knows modules and autograd, not units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

ONLY = "default"
"""PEFT's own name for the only adapter of a model."""
VALUES_NEEDED_AFTER = {
    "down_proj": ("post_feedforward_layernorm",),
    "k_proj": ("k_norm", "q_norm"),
    "v_proj": ("v_norm",),
}
"""Projections that can be left out of a layer, and the modules whose gradients would need their values."""

Forwards = Mapping[nn.Module, Callable[[Tensor], Tensor]]


class _Linear(torch.autograd.Function):
    """The gradient of W x, with a value that is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None


class _Lora(torch.autograd.Function):
    """W x + b + s B a with a = A x' [..., rank] (LoRA, arXiv 2106.09685), or its gradient with a value that is
    given; x' is what dropout makes of x, None where it makes nothing. One pass over the output, where a sum of two
    projections takes three, and as many backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        down: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        scale: float,
        value: Tensor | None,
    ) -> Tensor:
        given = _rows(x if dropped is None else dropped)
        low = nn.functional.linear(given, down)
        ctx.save_for_backward(given, low, down, weight, up)
        ctx.scale, ctx.drops = scale, dropped is not None
        if value is not None:
            return value.view_as(value)
        out = nn.functional.linear(x, weight, bias)
        _add(_rows(out), low, up.t(), scale)
        return out

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None, None, Tensor, None, None]:
        given, low, down, weight, up = ctx.saved_tensors
        rows = _rows(gradients[0]).to(up.dtype)
        by_low = (rows @ up).mul_(ctx.scale)
        by_up = (rows.t() @ low).mul_(ctx.scale)
        by_x, by_dropped = gradients[0] @ weight, None
        if ctx.drops:
            by_dropped = (by_low @ down).view_as(by_x)
        else:
            _add(_rows(by_x), by_low, down)
        return by_x, by_dropped, by_low.t() @ given, None, None, by_up, None, None


def _rows(x: Tensor) -> Tensor:
    """[..., width] to [n, width]."""
    return x.reshape(-1, x.shape[-1])


def _add(out: Tensor, low: Tensor, up: Tensor, scale: float = 1.0) -> None:
    """Add scale x low @ up to `out`, which PEFT lets have another type: it keeps adapters in float32 on weights of
    16 bits."""
    if low.dtype == out.dtype:
        out.addmm_(low, up, alpha=scale)
    else:
        out.add_(low @ up, alpha=scale)


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


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A projection that is not trained, with what LoRA adds to it. Each way of computing it takes x [..., in] and
    gives [..., out], with the same gradient.

    Attributes:
        module: whose forward the others take the place of.
        base: the projection alone.
        lora: PEFT's module around it; None where there is none, or where it does more than add (DoRA, IA3): PEFT
            computes that from what `base` gives.
    """

    module: nn.Module
    base: nn.Linear
    lora: Any

    def value(self, x: Tensor) -> Tensor:
        """As the layer has it."""
        return nn.Linear.forward(self.base, x) if self.lora is None else self._with_lora(x, None)

    def given(self, x: Tensor, value: Tensor) -> Tensor:
        """With a value that is known."""
        if self.lora is not None:
            return self._with_lora(x, value)
        out: Tensor = _Linear.apply(x, self.base.weight, value)  # type: ignore[no-untyped-call]
        return out

    def without_value(self, x: Tensor) -> Tensor:
        """Zeros."""
        return self.given(x, x.new_zeros(1).expand(*x.shape[:-1], self.base.out_features))

    def _with_lora(self, x: Tensor, value: Tensor | None) -> Tensor:
        down, up, base = self.lora.lora_A[ONLY].weight, self.lora.lora_B[ONLY].weight, self.base
        dropped = self.lora.lora_dropout[ONLY](x.to(down.dtype))
        out: Tensor = _Lora.apply(  # type: ignore[no-untyped-call]
            x,
            None if dropped is x else dropped,
            down,
            base.weight,
            base.bias,
            up,
            self.lora.scaling[ONLY],
            value,
        )
        return out


@dataclass(frozen=True, slots=True)
class Projections:
    """A layer's, by what is needed of them.

    Attributes:
        adapted: those with a LoRA adapter, which are computed here.
        queries: those of the queries, which K and V do not need.
        unneeded: those whose values the gradients do not need.
        kept: the others, whose values may be kept from the forward pass.
    """

    adapted: tuple[Projection, ...]
    queries: tuple[Projection, ...]
    unneeded: tuple[Projection, ...]
    kept: tuple[Projection, ...]


def projections(layer: nn.Module) -> Projections:
    """Of a layer with the adapter that is on it now."""
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    every: list[Projection] = []
    queries, unneeded = [], []
    for path, module in layer.named_modules():
        if type(module) is not nn.Linear or module.weight.requires_grad:
            continue
        place = path.removesuffix(".base_layer")
        tuner = layer.get_submodule(place) if place != path else None
        adds = tuner is not None and _only_adds(tuner)
        found = (
            Projection(tuner, module, tuner)
            if tuner is not None and adds
            else Projection(module, module, None)
        )
        every.append(found)
        name = place.rpartition(".")[2]
        if name == "q_proj":
            queries.append(found)
        after = VALUES_NEEDED_AFTER.get(name)
        if after is not None and names.isdisjoint(after) and (tuner is None or adds):
            unneeded.append(found)
    return Projections(
        adapted=tuple(found for found in every if found.lora is not None),
        queries=tuple(queries),
        unneeded=tuple(unneeded),
        kept=tuple(found for found in every if found not in unneeded),
    )


def _only_adds(tuner: nn.Module) -> bool:
    """Whether a tuner is LoRA's own sum. Others scale what the projection gives, so their gradients need it."""
    if not isinstance(tuner, lora.Linear):
        return False
    variants: Any = tuner.lora_variant
    biases: Any = tuner.lora_bias
    return ONLY not in variants and not biases[ONLY]


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """While a layer is computed and some of its modules are computed by other functions of their input."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
