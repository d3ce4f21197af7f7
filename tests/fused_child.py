"""liger-kernel's kernels on a CPU, with Triton's interpreter: ``python -m tests.fused_child NAME...``.

Triton reads how it is to run when kernels are defined, so this is a process of its own. It prints a JSON line: of
each architecture which kernels were fused, and how far its loss and gradients are from backpropagation without.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

import tests.conftest  # noqa: F401  stand-ins and thread limits, before transformers
from tests.architectures import CONFIGS
from tests.test_units import a_trained_adapter, by_backpropagation, by_units, examples, worst_error


def do_as_the_compiler() -> None:
    """What the norms' kernels need of the interpreter: numbers as float32, and a function of CUDA's library."""
    import liger_kernel.ops.rms_norm as norms

    norms.rsqrt = lambda x: tl.math.rsqrt(x)
    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(value)

    interpreter._implicit_cvt = converted


def random_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms that scale by one would hide much
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def errors(name: str) -> dict[str, Any]:
    from harli_appliance.training.backbone import Backbone
    from harli_appliance.training.fused_kernels import fuse

    plain, adapter = a_trained_adapter(random_model(name))
    data = examples(1, (14, 5))
    loss, wanted = by_backpropagation(adapter, data)
    kernels = fuse(plain.model)
    fused = Backbone(plain.model, kernels)
    fused_loss, found = by_units(fused, adapter, data, 20, lambda: (8, 1), 7)
    return {
        "fused": kernels.fused,
        "norms": fused_norms(fused.model),
        "loss": abs(fused_loss - loss),
        "gradients": worst_error(found, wanted),
    }


def another_kind() -> dict[str, Any]:
    """Norms that are taken for others than they are."""
    from harli_appliance.training import fused_kernels

    known = fused_kernels._kind
    fused_kernels._kind = lambda norm: (known(norm)[0], 1.0, "gemma")
    model = random_model("llama")
    fused = fused_kernels.fuse(model).fused
    fused_kernels._kind = known
    return {"fused": fused, "norms": fused_norms(model)}


def twin() -> float:
    """How far a twin's norms are from its model's once their weight has changed."""
    from harli_appliance.training.backbone import Backbone
    from harli_appliance.training.fused_kernels import fuse

    model = random_model("llama")
    backbone = Backbone(model, fuse(model))
    other = backbone.twin()
    assert fused_norms(other.model) == fused_norms(model)
    x = torch.randn(3, 48)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(48))  # the weight is shared, not copied
        return (other.model.model.norm(x) - model.model.norm(x)).abs().max().item()


def fused_norms(model: Any) -> int:
    return sum("forward" in module.__dict__ for module in model.modules())


if __name__ == "__main__":
    do_as_the_compiler()
    found: dict[str, Any] = {name: errors(name) for name in sys.argv[1:]}
    print(json.dumps({**found, "another_kind": another_kind(), "twin": twin()}))
