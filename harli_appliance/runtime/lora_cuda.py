"""Adapters on a GPU: a batch that uses none runs none of their kernels, in captured graphs either.

SGLang captures its decode graphs with the adapters' kernels, some 250 in a model of 32 layers, which find at every
step that there is nothing to do. Its graph runner can capture each batch size a second time, and then replays what
a batch needs; here adapters are left out of that. Knows SGLang's LoRA layers and graph runner.
"""

from __future__ import annotations

from functools import partialmethod

from sglang.srt.lora.backend.triton_backend import TritonLoRABackend
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_utils import get_capture_lora_variant


def leave_out_unused() -> None:
    """From now on; before the runtime is made."""
    TritonLoRABackend.skip_inactive_lora_batches = property(
        lambda backend: get_capture_lora_variant() != "lora"
    )
    DecodeCudaGraphRunner.__init__ = partialmethod(DecodeCudaGraphRunner.__init__, record_nolora_graph=True)
