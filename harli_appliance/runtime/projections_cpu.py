"""Projections of a few rows on a CPU in the order of operands that is faster: x W^T, or (W x^T)^T.

A decode step of a few requests reads every weight once and computes next to nothing with it, so it should take as
long as reading takes. MKL's x W^T takes up to four times that when x has two to five rows, and (W x^T)^T does not;
for one row, W (x x)^T with the row twice beats the product of matrix and vector. For other shapes, counts and CPUs
it is the other way round, so both are timed at start, on the model's own weights. Numbers agree to rounding, and
which way is taken depends on the number of rows alone. Knows SGLang's unquantized layers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.utils import use_intel_amx_backend
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_ROWS = 8
"""With more rows the arithmetic counts, and x W^T is faster everywhere it was tried."""
WORTH = 0.9
"""Columns are taken where they need at most this share of the time."""
PASS_BYTES = 2**26
"""Weights that are gone through in one timing, so that none is still in a cache when it is read again."""
ROUNDS = 3


def by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias as (W x^T)^T + bias; [n, in] to [n, out], contiguous."""
    rows = len(x)
    columns = x.repeat(2, 1).t() if rows == 1 else x.t()
    out = torch.mm(weight, columns)[:, :rows].t().contiguous()
    return out if bias is None else out.add_(bias)


def faster_by_columns(weights: Sequence[Tensor]) -> frozenset[int]:
    """The numbers of rows for which `by_columns` is worth it.

    Args:
        weights: of one shape [out, in]; the more of them, the truer the times.
    """
    passed = weights[: max(1, PASS_BYTES // weights[0].nbytes)]
    found = []
    for rows in range(1, MOST_ROWS + 1):
        x = torch.ones(rows, weights[0].shape[1], dtype=weights[0].dtype)
        plain, columns = (_least_seconds(way, x, passed) for way in (linear, by_columns))
        if columns <= WORTH * plain:
            found.append(rows)
    return frozenset(found)


def _least_seconds(way: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for weight in weights:
            way(x, weight, None)
        times.append(time.perf_counter() - began)
    return min(times)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, columns: frozenset[int]) -> Tensor:
    """x W^T + bias, [..., in] to [..., out]; `columns` are the numbers of rows that go by columns."""
    if x.dim() == 2 and len(x) in columns:
        return by_columns(x, weight, bias)
    return linear(x, weight, bias)


class FewRows:
    """What stands in the place of a plain layer's method."""

    def __init__(self, columns: frozenset[int]) -> None:
        super().__init__()
        self.columns = columns

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return project(x, layer.weight, bias, self.columns)


class FewRowsLinear(FewRows, UnquantizedLinearMethod):  # type: ignore[misc]  # SGLang is untyped here
    """Of a linear layer."""


class FewRowsHead(FewRows, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """Of an embedding that also gives the logits; SGLang asks it because its name is not that of a method without
    quantization."""


def install(model: nn.Module) -> None:
    """Change the plain layers of a model that SGLang has loaded in float32."""
    by_shape = defaultdict(list)
    for module in _plain(model.modules()):
        by_shape[tuple(module.weight.shape)].append(module)
    with torch.inference_mode():
        for modules in by_shape.values():
            columns = faster_by_columns([module.weight for module in modules])
            for module in modules:
                linear_layer = type(module.quant_method) is UnquantizedLinearMethod
                module.quant_method = (FewRowsLinear if linear_layer else FewRowsHead)(columns)


def _plain(modules: Iterable[nn.Module]) -> list[Any]:
    kinds = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    found: list[Any] = [module for module in modules if type(getattr(module, "quant_method", None)) in kinds]
    return [
        module
        for module in found
        if module.weight.dtype == torch.float32 and not use_intel_amx_backend(module)
    ]
