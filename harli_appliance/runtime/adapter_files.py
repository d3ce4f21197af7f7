"""The files of a LoRA adapter as SGLang serves them: checked against the model, and completed.

SGLang looks at little of an adapter when it is loaded, and fails the whole batch that first uses it; a person
should hear of it when loading. Knows PEFT's file format and the names of projections; does not know SGLang.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from harli_appliance.errors import UsageError

WEIGHTS = "adapter_model.safetensors"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that SGLang computes as one: it wants all of them to be adapted, or none."""
_NAME = re.compile(r"(.*\.layers\.(\d{1,4})\.\w+\.)(\w+)\.lora_([AB])\.weight")
"""Groups: what leads to the projection, the layer, the projection, the matrix."""
_UNEQUAL_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin, of PEFT, that change the base model's weights too."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it was read: PEFT's description of it, and its tensors by PEFT's names.

    The fused projections that it leaves alone have tensors of zeros, which change nothing.
    """

    name: str
    folder: Path
    described: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_adapter(name: str, folder: Path, config: Any, max_rank: int) -> AdapterFiles:
    """
    Args:
        config: the model's transformers configuration (of its text part).

    Raises:
        UsageError: it cannot be served on this model; names the adapter, what is at fault, and what would fit.
    """
    described = _described(name, folder, max_rank)
    path = folder / WEIGHTS
    try:
        tensors = load(path.read_bytes())  # mapped, they would change with the file while they are served
    except (OSError, SafetensorError) as error:
        raise _refusal(name, f"{path} cannot be read: {error}") from error
    if not tensors:
        raise _refusal(name, f"{path} holds no tensors")
    sizes = _projections(config)
    completed: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):  # they come in any order; what is told first does not
        found = _NAME.fullmatch(key)
        if found is None or found[3] not in sizes or int(found[2]) >= config.num_hidden_layers:
            raise _refusal(name, f"tensor {key} belongs to no projection of this model that can be adapted")
        before, projection, matrix = found[1], found[3], found[4]
        rank = described["r"]
        fits = _shape(sizes[projection], matrix, rank)
        if list(tensor.shape) != fits:
            shape = list(tensor.shape)
            raise _refusal(name, f"tensor {key} is of shape {shape}, this model and 'r': {rank} need {fits}")
        other = f"{before}{projection}.lora_{'B' if matrix == 'A' else 'A'}.weight"
        if other not in tensors:
            raise _refusal(name, f"tensor {other} is missing; save the adapter again with PEFT")
        if not _is_target(before + projection, described["target_modules"]):
            raise _refusal(
                name, f"'target_modules' does not name {projection}, which {key} is of; add it there"
            )
        if not tensor.float().isfinite().all():
            raise _refusal(name, f"tensor {key} holds numbers that are not finite; train the adapter again")
        for member in next((group for group in FUSED if projection in group), ()):
            zeros = tensor.new_zeros(_shape(sizes[member], matrix, rank))
            completed.setdefault(f"{before}{member}.lora_{matrix}.weight", zeros)
        completed[key] = tensor
    return AdapterFiles(name, folder, {**described, "target_modules": list(sizes)}, completed)


def _described(name: str, folder: Path, max_rank: int) -> dict[str, Any]:
    """The configuration; SGLang would take every adapter for plain LoRA, and leave out what makes it another."""
    path = folder / "adapter_config.json"
    try:
        read: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(name, f"{path} cannot be read: {error}") from error
    described: dict[str, Any] = read if isinstance(read, dict) else {}
    method = str(described.get("peft_type"))
    if method == "LORA" and described.get("use_dora"):
        method = "DoRA"
    if method != "LORA":
        raise _refusal(name, f"it is of the method {method}; only LoRA can be served")
    rank, alpha, targets = (described.get(field) for field in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _refusal(name, f"'r' in {path} is {json.dumps(rank)}; write its rank, 1 or more")
    if rank > max_rank:
        raise _refusal(name, f"its rank is {rank}, the largest is training.max_lora_rank = {max_rank}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise _refusal(name, f"'lora_alpha' in {path} is {json.dumps(alpha)}; write a number")
    if not targets or not (
        isinstance(targets, str)
        or (isinstance(targets, list) and all(isinstance(target, str) for target in targets))
    ):
        raise _refusal(name, f"'target_modules' in {path} must list the projections that are adapted")
    if described.get("use_rslora"):
        raise _refusal(
            name, "'use_rslora' is not served; multiply 'lora_alpha' by sqrt(r) and set 'use_rslora' to false"
        )
    for field in ("alpha_pattern", "rank_pattern"):
        if described.get(field):
            raise _refusal(
                name, f"'{field}' is not served; train it with one rank and alpha for all projections"
            )
    start = str(described.get("init_lora_weights")).lower()
    if start.startswith(_UNEQUAL_BASE):
        raise _refusal(
            name,
            f"it is for a base model that 'init_lora_weights': '{start}' has changed; convert it to plain LoRA",
        )
    return described


def _is_target(path: str, targets: str | list[str]) -> bool:
    """As PEFT matches names; a pattern is taken at its word."""
    return isinstance(targets, str) or any(path.endswith(f".{target}") for target in targets)


def _shape(size: tuple[int, int], matrix: str, rank: int) -> list[int]:
    inner, outer = size
    return [rank, inner] if matrix == "A" else [outer, rank]


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
