"""The CPU operators that stand in for SGLang's plain ones: in place, and the same numbers bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import Serving


def operators(serving: Serving, kind: str) -> list[Any]:
    from harli_appliance.runtime import operators_cpu

    wanted = getattr(operators_cpu, kind)
    return [
        module
        for module in serving.runtime.model.modules()
        if any(isinstance(module.__dict__.get(slot), wanted) for slot in ("_forward_method", "forward"))
    ]


def test_norms_of_every_layer_are_replaced_and_equal(serving: Serving) -> None:
    norms = operators(serving, "FusedNorm")
    assert len(norms) == 2 * len(serving.runtime.model.model.layers) + 1
    generator = torch.Generator().manual_seed(0)
    norm = norms[0]
    x, residual = torch.randn(2, 7, norm.hidden_size, generator=generator)
    with torch.inference_mode():
        assert torch.equal(norm(x), norm.forward_native(x))
        for found, wanted in zip(norm(x, residual), norm.forward_native(x, residual), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_rotations_are_equal_whether_query_and_key_are_one_matrix_or_two(
    serving: Serving, side_by_side: bool
) -> None:
    rotary = operators(serving, "JointRotary")[0]
    generator, size = torch.Generator().manual_seed(1), rotary.head_size
    positions = torch.tensor([0, 3, 50, 7, 200])
    query, key, _ = torch.randn(5, 8 * size, generator=generator).split([4 * size, 2 * size, 2 * size], dim=1)
    if not side_by_side:
        query, key = query.clone(), key.clone()
    before = query.clone(), key.clone()
    with torch.inference_mode():
        found, wanted = rotary(positions, query, key), rotary.forward_native(positions, query, key)
    for rotated, expected, original, kept in zip(found, wanted, (query, key), before, strict=True):
        assert torch.equal(rotated, expected)
        assert torch.equal(original, kept), "the inputs are left alone"


def test_projections_are_replaced_in_every_layer(serving: Serving) -> None:
    assert len(operators(serving, "BareProjection")) == 4 * len(serving.runtime.model.model.layers)


def test_a_parameter_assigned_anew_is_the_one_that_is_used(serving: Serving) -> None:
    from harli_appliance.runtime.operators_cpu import _find_at_once

    layer = torch.nn.Linear(2, 2, bias=False)
    _find_at_once(layer)
    assert layer.__dict__["weight"] is layer.weight
    layer.weight = torch.nn.Parameter(torch.eye(2))
    assert torch.equal(layer(torch.ones(1, 2)), torch.ones(1, 2))
