"""Whether the files of a LoRA adapter fit the model, before SGLang is asked to load them.

SGLang looks at shapes only when a batch first uses the adapter, and then fails the batch; a person should hear of
it when loading. Knows PEFT's file format and the names of projections; does not know SGLang.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harli_appliance.errors import UsageError

WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight$")


def check_adapter(name: str, folder: Path, config: Any, max_rank: int) -> None:
    """Refuse an adapter whose tensors are not those of a LoRA adapter of this model.

    Args:
        config: the model's transformers configuration (of its text part).

    Raises:
        UsageError: names the adapter, the first tensor at fault, and what would fit.
    """
    _check_method(name, folder)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _refusal(name, f"{path} cannot be read: {error}") from error
    if not shapes:
        raise _refusal(name, f"{path} holds no tensors")
    sizes = _projections(config)
    for key, shape in shapes.items():
        found = _NAME.search(key)
        if found is None or found[2] not in sizes or int(found[1]) >= config.num_hidden_layers:
            raise _refusal(name, f"tensor {key} belongs to no projection of this model that can be adapted")
        inner, outer = sizes[found[2]]
        rank = shape[0] if found[3] == "A" else shape[-1]
        fits = (rank, inner) if found[3] == "A" else (outer, rank)
        if shape != fits:
            raise _refusal(name, f"tensor {key} is of shape {list(shape)}, this model needs {list(fits)}")
        if rank > max_rank:
            raise _refusal(name, f"its rank is {rank}, the largest is training.max_lora_rank = {max_rank}")


def _check_method(name: str, folder: Path) -> None:
    """SGLang would take every adapter for LoRA, and leave out what makes it another."""
    path = folder / "adapter_config.json"
    try:
        described: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal(name, f"{path} cannot be read: {error}") from error
    method = str(described.get("peft_type")) if isinstance(described, dict) else "unknown"
    if method == "LORA" and described.get("use_dora"):
        method = "DoRA"
    if method != "LORA":
        raise _refusal(name, f"it is of the method {method}; only LoRA can be served")


def _projections(config: Any) -> Mapping[str, tuple[int, int]]:
    """(input, output) size of each projection."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def _refusal(name: str, why: str) -> UsageError:
    return UsageError(f"adapter {name!r} cannot be served: {why}", code="invalid_adapter", param="lora_path")
