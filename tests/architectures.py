"""Tiny models of every architecture, with random weights in every parameter (biases and norms too)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 331
"""Not a multiple of 64, to which SGLang pads."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    # What the tiny model of conftest.py has not: scaled rotary positions, biases, tied embeddings.
    "llama": lambda: LlamaConfig(
        **{**COMMON, "tie_word_embeddings": True}, rope_parameters=LLAMA_3_ROPE, attention_bias=True
    ),
    "qwen2": lambda: Qwen2Config(**{**COMMON, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=200, head_dim=16),
    "gemma-2": lambda: Gemma2Config(
        **{**COMMON, "tie_word_embeddings": True},
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=2.0,
        final_logit_softcapping=6.0,
    ),
    "gemma-3": lambda: Gemma3TextConfig(
        **{**COMMON, "tie_word_embeddings": True},
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def make(config: Any, folder: Path, tokenizer: Path) -> Path:
    """Write a random fp32 model of `config`, with the tokenizer that lies in `tokenizer`."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    for path in tokenizer.glob("*.jinja"):
        shutil.copy(path, folder)
    generator = torch.Generator().manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
            # A tied model with a large embedding would only ever repeat its last token.
            scale = 0.03 if "embed" in name and config.tie_word_embeddings else 0.15
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder
