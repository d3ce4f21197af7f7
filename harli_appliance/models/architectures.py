"""Which models can be finetuned, told from their config.json. Knows what SGLang 0.5.21 computes differently.

Serving is wider: whatever SGLang can load. Finetuning needs a transformers twin on the same weights that computes
what SGLang serves, exactly; that has been proven for the architectures named here and for nothing else. Does
not know torch, so that a client can ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harli_appliance.errors import ConfigError

FINETUNABLE = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    }
)

WINDOW_IGNORED = frozenset({"MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""SGLang lets every layer of these attend to the whole context, whatever window their configuration names."""

TRANSFORMERS_WINDOW = 4096
"""What transformers assumes where a configuration of theirs does not name a window."""

INNER_GRAIN = 32
"""On a CPU SGLang pads the inner size to a multiple of this, and its LoRA layers then refuse adapters."""


def architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ["unknown"]
    return str(names[0])


def finetuning_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why this model can be served but not finetuned, in one line; None when it can be finetuned."""
    name = architecture(config)
    if name not in FINETUNABLE:
        return f"{name} can be served but not finetuned; finetuning knows {', '.join(sorted(FINETUNABLE))}"
    if config.get("quantization_config"):
        return f"this {name} is quantized and can be served but not finetuned; use its unquantized weights"
    inner = int(config.get("intermediate_size", 0))
    if inner % INNER_GRAIN:
        return (
            f"this {name} has intermediate_size {inner}, not a multiple of {INNER_GRAIN}; "
            "it can be served but not finetuned"
        )
    return None


def served_context(config: Mapping[str, Any], wanted: int | None) -> int | None:
    """The context length to serve a model with; None for the model's own.

    Args:
        wanted: what the settings ask for, None when they do not.

    Raises:
        ConfigError: more is wanted than SGLang computes as the model was trained.
    """
    window = _ignored_window(config)
    if window is None:
        return wanted
    if wanted is not None and wanted > window:
        raise ConfigError(
            f"model.context_length is {wanted}, but SGLang serves this {architecture(config)} as it was trained "
            f"only within its attention window of {window} tokens; set model.context_length to {window} or less",
            param="model.context_length",
        )
    return wanted or min(window, int(config.get("max_position_embeddings", window)))


def longest_context(config: Mapping[str, Any], wanted: int | None) -> int | None:
    """Tokens that an answer with its prompt, or an example, may have at most; None where the model does not say.

    Raises:
        ConfigError: see `served_context`.
    """
    served, own = served_context(config, wanted), config.get("max_position_embeddings")
    if own is None:
        return served
    scaling = config.get("rope_scaling") or {}
    counted = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    own = int(own * (1.0 if counted else scaling.get("factor", 1.0)))
    return own if served is None else min(own, served)


def _ignored_window(config: Mapping[str, Any]) -> int | None:
    """The attention window that a model was trained with and that SGLang does not apply."""
    name = architecture(config)
    if name not in WINDOW_IGNORED:
        return None
    if name != "MistralForCausalLM":
        if not config.get("use_sliding_window", False):
            return None
        layers = config.get("layer_types")
        if layers is not None and "sliding_attention" not in layers:
            return None
    window = config.get("sliding_window", TRANSFORMERS_WINDOW)
    return None if window is None else int(window)
