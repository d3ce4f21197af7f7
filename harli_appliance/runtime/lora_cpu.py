"""SGLang's torch LoRA backend for CPUs: no pinned memory, and no LoRA work in batches without an adapter.

Registered under `NAME` in SGLang's own registry of LoRA backends. The mathematics is inherited; only the
preparation of a batch is ours, because SGLang's pins every small tensor, which needs an accelerator.
"""

from __future__ import annotations

import torch
from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo
from sglang.srt.lora.utils import generate_sequence_lengths
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

NAME = "harli_cpu"


class CpuLoRABackend(TorchNativeLoRABackend):  # type: ignore[misc]  # SGLang is untyped here
    name = NAME
    # LoRAManager sets `has_active_lora` on the batch; layers then skip LoRA when no request uses an adapter.
    skip_inactive_lora_batches = True

    def prepare_lora_batch(
        self,
        forward_batch: ForwardBatch,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Describe the batch as runs of consecutive requests that share an adapter."""
        indices, run_of_request = torch.unique_consecutive(
            torch.tensor(weight_indices, dtype=torch.int32), return_inverse=True
        )
        lengths = generate_sequence_lengths(forward_batch, device=torch.device("cpu"))
        run_lengths = torch.zeros_like(indices).scatter_add_(0, run_of_request, lengths.to(torch.int32))
        bounds = torch.zeros(len(run_lengths) + 1, dtype=torch.int32)
        bounds[1:] = torch.cumsum(run_lengths, dim=0)
        ranks = torch.tensor(lora_ranks, dtype=torch.int32)
        scales = torch.tensor(scalings, dtype=torch.float)
        self.batch_info = TorchNativeLoRABatchInfo(
            bs=forward_batch.batch_size,
            num_segments=len(indices),
            max_len=int(run_lengths.max()),
            use_cuda_graph=False,
            seg_lens=run_lengths,
            seg_indptr=bounds,
            weight_indices=indices,
            lora_ranks=ranks,
            scalings=scales,
            permutation=None,
            lora_ranks_cpu=ranks,
            seg_indptr_cpu=bounds,
            seg_lens_cpu=run_lengths,
            weight_indices_cpu=indices,
            scalings_cpu=scales,
        )


@register_lora_backend(NAME)  # type: ignore[untyped-decorator]
def _backend() -> type[CpuLoRABackend]:
    return CpuLoRABackend
