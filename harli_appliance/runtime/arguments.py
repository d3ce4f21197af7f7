"""What SGLang is started with. Knows SGLang's server arguments; imports nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harli_appliance.runtime import grammar

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What the runtime is started with; sizes in tokens."""

    model: Path
    device: str = "cpu"
    pool_slots: int = 8192
    context_length: int | None = None
    max_running_requests: int = 32
    chunked_prefill_tokens: int = 128
    max_lora_rank: int = 16
    max_adapters: int = 4
    lora: bool = True
    seed: int = 0
    attention: str | None = None
    graphs: bool = True
    """Whether a GPU decodes with CUDA graphs."""
    partitions: bool = False
    """Whether steps run on a part of a GPU at times, where graphs of the whole of it are of no use."""


GRAPH_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Requests of a decode step for which graphs are captured where every partition has a set of its own; others take
the next larger one. Fewer than SGLang would capture: a step takes hardly longer for a few rows more."""


def graph_batches(most: int) -> list[int]:
    """Those up to `most` requests, beyond the largest of them in equal steps, and `most`."""
    largest = GRAPH_BATCHES[-1]
    further = range(largest + largest // 2, most, largest // 2)
    return [*(batch for batch in (*GRAPH_BATCHES, *further) if batch < most), most]


def server_arguments(options: RuntimeOptions) -> dict[str, Any]:
    """Keyword arguments of SGLang's ``ServerArgs``."""
    cpu = options.device == "cpu"
    arguments: dict[str, Any] = {
        "model_path": str(options.model),
        "device": options.device,
        "dtype": "float32" if cpu else "bfloat16",
        "sampling_backend": "pytorch",  # harli_appliance.runtime.sampler, registered under this name
        "grammar_backend": grammar.BACKEND,
        "constrained_json_whitespace_pattern": grammar.WHITESPACE,
        "disable_overlap_schedule": True,  # a step must be over when `execute` returns
        "max_total_tokens": options.pool_slots,
        "max_running_requests": options.max_running_requests,
        "chunked_prefill_size": options.chunked_prefill_tokens,
        "context_length": options.context_length,
        "random_seed": options.seed,
        "skip_server_warmup": True,
        "watchdog_timeout": 1e9,
        "log_level": "warning",
    }
    if cpu:
        arguments |= {
            "attention_backend": "torch_native",  # harli_appliance.runtime.attention_cpu, under this name
            "disable_cuda_graph": True,
            "mem_fraction_static": 0.1,  # the pool is sized by max_total_tokens
        }
    else:
        arguments |= {
            "attention_backend": options.attention,
            "disable_cuda_graph": not options.graphs,
        }
        if options.graphs and options.partitions:
            arguments |= {
                "cuda_graph_bs_decode": graph_batches(options.max_running_requests),
                "disable_prefill_cuda_graph": True,  # captured on the whole device only
            }
    if options.lora:
        arguments |= {
            "enable_lora": True,
            "lora_backend": "harli_cpu" if cpu else "triton",
            "max_lora_rank": options.max_lora_rank,
            "max_loras_per_batch": options.max_adapters + 1,  # the base counts as one
            "lora_target_modules": list(LORA_TARGETS),
        }
    return arguments
