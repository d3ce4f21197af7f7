"""A transformers model whose parameters are views of SGLang's weights: nothing is copied.

SGLang fuses q, k, v and gate, up into single matrices; each transformers parameter is a slice of one of them.
Everything else has the same name and meaning on both sides, Gemma's norms too (both keep w and scale by 1 + w).
Knows the parameter names of both sides; does not know training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from harli_appliance.errors import ConfigError, UsageError
from harli_appliance.models.architectures import finetuning_obstacle


def shared_model(sglang_model: nn.Module, folder: Path) -> Any:
    """Build the transformers twin of a model that SGLang has loaded (without tensor parallelism).

    Args:
        sglang_model: SGLang's module tree; its LoRA wrappers are looked through.
        folder: the Hugging Face folder that SGLang loaded it from.

    Returns:
        A transformers causal LM in eval mode; every parameter is frozen and shares SGLang's storage.

    Raises:
        UsageError: the model is not one that can be finetuned; the message says why.
        ConfigError: SGLang has left out a parameter of the model, so that what it serves would be wrong.
    """
    config = AutoConfig.from_pretrained(folder)
    if (obstacle := finetuning_obstacle(config.to_dict())) is not None:
        raise UsageError(obstacle, param="model")
    source = {name.replace(".base_layer.", "."): p.data for name, p in sglang_model.named_parameters()}
    dtype = source["model.norm.weight"].dtype
    with torch.device("meta"):
        # torch's fused attention cannot cap scores.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        twin = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager" if capped else "sdpa"
        )
    locate = _Locator(config, source)
    for name, _ in list(twin.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(module), leaf, nn.Parameter(locate(name), requires_grad=False))
    if config.tie_word_embeddings:
        twin.tie_weights()
    _rebuild_buffers(twin, config, source["model.norm.weight"].device)
    assert_shared(twin, sglang_model)
    return twin.eval()


def assert_shared(twin: nn.Module, sglang_model: nn.Module) -> None:
    """Raise unless every parameter of `twin` lies inside storage of `sglang_model`."""
    storages = {p.untyped_storage().data_ptr() for p in sglang_model.parameters()}
    copied = [n for n, p in twin.named_parameters() if p.untyped_storage().data_ptr() not in storages]
    if copied:
        raise RuntimeError(f"parameters not shared with the runtime: {', '.join(copied[:3])}")


class _Locator:
    """Finds the slice of SGLang's weights that is a given transformers parameter."""

    def __init__(self, config: Any, source: Mapping[str, Tensor]) -> None:
        self._source = source
        self._vocabulary = int(config.vocab_size)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        inner = int(config.intermediate_size)
        self._fused = {
            "q_proj": ("qkv_proj", 0, q),
            "k_proj": ("qkv_proj", q, kv),
            "v_proj": ("qkv_proj", q + kv, kv),
            "gate_proj": ("gate_up_proj", 0, inner),
            "up_proj": ("gate_up_proj", inner, inner),
        }

    def __call__(self, name: str) -> Tensor:
        projection = name.split(".")[-2]
        if projection in self._fused:
            fused, start, length = self._fused[projection]
            return self._find(name.replace(projection, fused), name).narrow(0, start, length)
        found = self._find(name, name)
        if projection in ("embed_tokens", "lm_head"):  # SGLang pads the vocabulary to a multiple of 64
            return found.narrow(0, 0, self._vocabulary)
        return found

    def _find(self, source: str, name: str) -> Tensor:
        found = self._source.get(source)
        if found is None:
            raise ConfigError(
                f"SGLang leaves {name} of this model out, so that its answers would be wrong; use another model",
                param="model",
            )
        return found


def _rebuild_buffers(twin: nn.Module, config: Any, device: torch.device) -> None:
    """Compute rotary tables and embedding scales again: buffers made on the meta device have no values.

    They lie where the weights do; a unit that copied a table to the GPU would wait for whatever runs there.
    """
    rebuilt: dict[str, nn.Module] = {}
    for name, buffer in list(twin.named_buffers()):
        if not buffer.is_meta:
            continue
        module_name, _, leaf = name.rpartition(".")
        module: Any = twin.get_submodule(module_name)
        if leaf == "embed_scale":  # Gemma's; kept beside the buffer as a number
            value = torch.tensor(module.scalar_embed_scale)
        else:
            if module_name not in rebuilt:
                rebuilt[module_name] = type(module)(config=config)
            value = getattr(rebuilt[module_name], leaf)
        module.register_buffer(leaf, value.to(device), persistent=False)
