"""What SGLang needs in order to import and run on a machine without CUDA. Import this before ``sglang``.

SGLang 0.5.21 serves Llama-like models on a CPU, but its modules assume that some CUDA-only things exist:

=====================  ========================================================================
missing                what stands in
=====================  ========================================================================
a CPU engine switch    ``SGLANG_USE_CPU_ENGINE=1``
``torchvision::nms``   torchvision from PyPI is linked to CUDA and its operators do not load beside a
                       CPU torch; only the operator's *name* is needed for its Python side to import
``sgl_kernel``         no CPU wheel; on a CPU without AMX only names are imported, every use on the
                       paths of the supported architectures is guarded by ``cpu_has_amx_support()``
pinned host memory     SGLang's LoRA layers ask for ``pin_memory=True``; without an accelerator torch
                       refuses. `unpin_lora` gives those modules a view of torch that ignores it
=====================  ========================================================================

Nothing of ``torch`` itself is patched. With an accelerator present, every function here does nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from typing import Any

import torch

_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_PINNED_CONSTRUCTORS = frozenset({"tensor", "empty", "zeros", "ones", "full", "arange"})
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that defines it


def install() -> None:
    """Put the stand-ins in place; idempotent, and a no-op where an accelerator exists."""
    if torch.accelerator.is_available():
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    _define_torchvision_names()
    _define_sgl_kernel_names()
    # SGLang says at import that AWQ and GGUF kernels are for GPUs; nobody asked for them here.
    warnings.filterwarnings("ignore", message="Only CUDA.*support (AWQ|GGUF)")
    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")


def _define_torchvision_names() -> None:
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(name + _NMS_SCHEMA)
    _libraries.append(library)


def _define_sgl_kernel_names() -> None:
    if "sgl_kernel" in sys.modules or importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = types.ModuleType("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.__dict__["__version__"] = "0.0.0"

    def missing_kernel(name: str) -> Any:
        if name.startswith("__") or not name.endswith("_cpu"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} needs a CPU with AMX and SGLang's CPU kernels")

        return refuse

    module.__dict__["__getattr__"] = missing_kernel
    sys.modules["sgl_kernel"] = module


class _UnpinnedTensor(torch.Tensor):
    """A tensor that takes a request for pinned memory as already served."""

    def pin_memory(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self


class _TorchWithoutPinning:
    """``torch`` as SGLang's LoRA layers see it: constructors drop ``pin_memory``."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        if name not in _PINNED_CONSTRUCTORS:
            return attribute

        def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)
            made: torch.Tensor = attribute(*args, **kwargs)
            return made.as_subclass(_UnpinnedTensor)

        return construct


def unpin_lora() -> None:
    """Let SGLang's LoRA layers build on a machine without an accelerator; call after importing sglang."""
    if torch.accelerator.is_available():
        return
    import sglang.srt.lora.layers as layers

    layers.torch = _TorchWithoutPinning()
