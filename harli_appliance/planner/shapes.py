"""How large a model is, as far as its costs go: parameters in matrices, layers, heads, from a config.json.

Knows numbers of Llama-like decoders (Llama, Mistral, Qwen 2, 2.5 and 3, Gemma); reads no weights and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harli_appliance.errors import UsageError
from harli_appliance.models.catalog import config_of


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes; `bytes_per_number` is 2 in bfloat16.

    Attributes:
        body_parameters: in the layers' matrices, which every token passes.
        head_parameters: of the output projection, which only sampled or learned tokens pass.
        embedding_parameters: held in memory beside these; 0 where the head is the embedding itself.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    body_parameters: int
    head_parameters: int
    embedding_parameters: int
    bytes_per_number: int = 2

    @property
    def weight_bytes(self) -> float:
        """What a decode step reads: every matrix once, and the embedding's rows, which are few."""
        return float(self.bytes_per_number * (self.body_parameters + self.head_parameters))

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.bytes_per_number * self.embedding_parameters

    @property
    def kv_bytes(self) -> float:
        """K and V of one token over all layers: one slot."""
        return float(2 * self.bytes_per_number * self.layers * self.kv_heads * self.head_size)

    @property
    def attention_flops(self) -> float:
        """Of one query token against one key, over all layers: a multiply-add each for scores and values."""
        return 4.0 * self.layers * self.heads * self.head_size

    def lease_slots(self, tokens: int) -> int:
        """Slots that a micro-batch of `tokens` tokens leases where steps can be fused with it: its K and V, its
        layer inputs, and one layer's gradients (see "Memory" in docs/architecture.md)."""
        rows = -(-self.hidden // (self.kv_heads * self.head_size))
        return tokens + -(-tokens * rows // 2) + -(-tokens * (rows + 2) // (2 * self.layers))


def _shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    hidden, layers, inner = (
        int(config[key]) for key in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    heads, vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_size = int(config.get("head_dim") or hidden // heads)
    attention = 2 * hidden * head_size * (heads + kv_heads)  # q and o; k and v
    head = vocabulary * hidden
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        body_parameters=layers * (attention + 3 * hidden * inner),
        head_parameters=head,
        embedding_parameters=0 if config.get("tie_word_embeddings", False) else head,
    )


def _config(
    hidden: int, layers: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> Mapping[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


_LLAMA_8B = _config(4096, 32, 14_336, 32, 8, 128_256)
_BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "Qwen/Qwen2.5-7B": _config(3584, 28, 18_944, 28, 4, 152_064),
    "HuggingFaceTB/SmolLM2-135M": _config(576, 30, 1536, 9, 3, 49_152, tied=True),
}
"""From the config.json that each publishes."""

BUILT_IN_MODELS = tuple(_BUILT_IN)


def model_shape(model: str) -> ModelShape:
    """The shape of a built-in model, or of the one in a Hugging Face folder.

    Args:
        model: a name of `BUILT_IN_MODELS`, with or without its owner, in any case; its instruct variant; or a
            folder.

    Raises:
        UsageError: there is no such model; lists the built-in ones.
        ConfigError: the folder's config.json cannot be read.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    wanted = (
        model.rpartition("/")[2].lower().removesuffix("-instruct").replace("llama-3-8b", "meta-llama-3-8b")
    )
    wanted = wanted.replace("meta-meta-", "meta-")
    for name, config in _BUILT_IN.items():
        if name.rpartition("/")[2].lower() == wanted:
            return _shape(name, config)
    known = ", ".join(BUILT_IN_MODELS)
    raise UsageError(f"{model}: no such model; give a Hugging Face folder or one of: {known}", param="model")


def _from_folder(folder: Path) -> ModelShape:
    config = config_of(folder)
    try:
        return _shape(folder.absolute().name, config.get("text_config") or config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"{folder}/config.json: is no decoder that can be planned for ({error}); give another model",
            param="model",
        ) from error
