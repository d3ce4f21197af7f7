"""Projections of a few rows: the same numbers in either order of operands, and the faster order is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.conftest import Serving


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_orders_give_the_same_projection(serving: Serving, rows: int, with_bias: bool) -> None:
    from harli_appliance.runtime.projections_cpu import project

    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 96, generator=generator), torch.randn(40, 96, generator=generator)
    bias = torch.randn(40, generator=generator) if with_bias else None
    kept = x.clone()
    found = project(x, weight, bias, frozenset(range(1, 9)))
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


def test_an_order_is_taken_only_where_it_is_faster(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    from harli_appliance.runtime import projections_cpu

    seconds = {linear: 1.0, projections_cpu.by_columns: 0.0}

    def measured(way: Any, x: Tensor, weights: Any) -> float:
        return seconds[way] + (0.5 + 0.1 * len(x) if way is projections_cpu.by_columns else 0.0)

    monkeypatch.setattr(projections_cpu, "_least_seconds", measured)
    assert projections_cpu.faster_by_columns([torch.ones(4, 3)]) == {1, 2, 3, 4}


def test_every_plain_layer_and_the_head_are_changed(serving: Serving) -> None:
    from harli_appliance.runtime.projections_cpu import FewRowsHead, FewRowsLinear

    methods = [getattr(module, "quant_method", None) for module in serving.runtime.model.modules()]
    layers = len(serving.runtime.model.model.layers)
    assert sum(isinstance(method, FewRowsLinear) for method in methods) == 4 * layers
    assert any(isinstance(method, FewRowsHead) for method in methods)


def test_logits_go_through_the_changed_head(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    from harli_appliance.runtime import projections_cpu

    head = serving.runtime.model.lm_head
    seen: list[tuple[int, ...]] = []

    def noting(x: Tensor, weight: Tensor, bias: Tensor | None, columns: frozenset[int]) -> Tensor:
        if weight is head.weight:
            seen.append(tuple(x.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(projections_cpu, "project", noting)
    hidden = torch.ones(3, head.weight.shape[1])
    with torch.inference_mode():
        logits = serving.runtime.model.logits_processor._compute_lm_head(hidden, head)
    assert seen == [(3, head.weight.shape[1])]
    assert torch.equal(logits, linear(hidden, head.weight))
