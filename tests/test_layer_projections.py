"""A projection with LoRA as one function: PEFT's values and gradients, with and without a value that is given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_it_is_what_peft_computes(reference: Any, dtype: torch.dtype, most: float) -> None:
    """On weights of 16 bits PEFT keeps the adapter in float32."""
    backbone = Backbone(copy.deepcopy(reference).to(dtype).requires_grad_(False))
    adapter = Adapter(backbone, rank=4, alpha=10, seed=1)
    generator = torch.Generator().manual_seed(5)
    every = [projection for layer in adapter.projections for projection in layer.adapted]
    assert len(every) == 7 * len(backbone.layers)
    for projection in every:
        up, down = (factor["default"].weight for factor in (projection.lora.lora_B, projection.lora.lora_A))
        assert up.dtype == torch.float32
        torch.nn.init.normal_(up, std=0.5, generator=generator)
        x = torch.randn(1, 9, projection.base.in_features, generator=generator).to(dtype).requires_grad_()
        wanted = projection.module(x)
        direction = torch.randn(wanted.shape, generator=generator).to(dtype)
        gradients = torch.autograd.grad(wanted, [x, up, down], direction)
        value = projection.value(x)
        assert value.dtype == wanted.dtype
        assert error(value, wanted) <= most
        assert torch.equal(projection.given(x, value.detach()), value)
        for made in (value, projection.given(x, value.detach()), projection.without_value(x)):
            found = torch.autograd.grad(made, [x, up, down], direction)
            assert all(error(a, b) <= most for a, b in zip(found, gradients, strict=True))
