"""How much memory a model needs, from its folder alone: the weights' shapes and config.json.

Reads the headers of safetensors files, not the weights. Knows file formats; does not know torch or what is free.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harli_appliance.errors import ConfigError
from harli_appliance.models.catalog import config_of

GIB = 1 << 30
BFLOAT16, FLOAT32 = 2, 4
"""Bytes of a number, as models are served on a GPU and on a CPU."""
COMFORTABLE = 0.8
"""Of the free memory: beyond it, what training and SGLang need besides weights and cache may not fit."""
LEAST_SLOTS = 256
"""The least value of memory.pool_slots."""
USUAL_SLOTS = 16_384
"""Where memory.pool_slots is not set, on a CPU."""
MOST_SLOTS = 1 << 20
"""That are taken on a GPU where it is not set."""
HEADER_LIMIT = 100_000_000
"""No safetensors header is longer (the format's own limit)."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts, so that bytes follow from the type that the model is served in.

    Attributes:
        parameters: numbers in the weights.
        kv_per_slot: numbers that one KV-cache slot holds: 2 x layers x kv heads x head size.
    """

    parameters: int
    kv_per_slot: int

    def bytes(self, slots: int, itemsize: int) -> int:
        """Weights and a KV cache of `slots` slots, in numbers of `itemsize` bytes."""
        return itemsize * (self.parameters + slots * self.kv_per_slot)

    def slots_in(self, memory: int, itemsize: int) -> int:
        """KV-cache slots that `memory` bytes hold beside the weights, 0 when not even these fit."""
        return max(0, memory // itemsize - self.parameters) // self.kv_per_slot

    def advice(self, free: int, itemsize: int) -> str:
        """What to do when it does not fit `free` bytes."""
        fitting = self.slots_in(int(COMFORTABLE * free), itemsize)
        if fitting >= LEAST_SLOTS:
            return f"memory.pool_slots = {fitting} would fit"
        return "its weights alone are too large: choose a smaller model (model.path)"


def model_size(folder: Path) -> ModelSize | None:
    """What the model in a Hugging Face folder amounts to; None when its weights are not in safetensors files.

    Raises:
        ConfigError: one of the files or config.json cannot be understood.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    return ModelSize(sum(_parameters(file) for file in files), _kv_per_slot(config_of(folder), folder))


def suitable_slots(size: ModelSize | None, free: int, *, gpu: bool) -> int:
    """Slots of a KV cache where none are set: a GPU's memory is there to be used, a machine's is not.

    Args:
        size: None where it is not known.
        free: bytes of the device's memory.
    """
    if not gpu or size is None:
        return USUAL_SLOTS
    return min(MOST_SLOTS, max(LEAST_SLOTS, size.slots_in(int(COMFORTABLE * free), BFLOAT16)))


def fitting_slots(folder: Path, asked: int | None, free: int, where: str, *, gpu: bool) -> int:
    """Slots of the KV cache that a model is served with, before anything is loaded.

    Args:
        asked: None for what suits the device.
        free: bytes of memory, of the device called `where`.

    Raises:
        ConfigError: weights and cache do not fit; says what would.
    """
    size, itemsize = model_size(folder), BFLOAT16 if gpu else FLOAT32
    slots = asked or suitable_slots(size, free, gpu=gpu)
    if size is None or (needed := size.bytes(slots, itemsize)) <= free:
        return slots
    raise ConfigError(
        f"{folder.name} with {slots} slots takes {needed / GIB:.1f} GiB and {where} has {free / GIB:.1f} GiB "
        f"free; {size.advice(free, itemsize)}",
        param="memory.pool_slots",
    )


def _kv_per_slot(config: dict[str, Any], folder: Path) -> int:
    text = config.get("text_config") or config
    try:
        heads = text.get("num_key_value_heads") or text["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        return int(2 * text["num_hidden_layers"] * heads * head)
    except KeyError as error:
        raise ConfigError(f"{folder}/config.json: no {error.args[0]!r}; copy the model again") from error


def _parameters(file: Path) -> int:
    """The format: a little-endian length of 8 bytes, then that much JSON: tensor name to dtype, shape, offsets."""
    try:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            header = json.loads(source.read(min(length, HEADER_LIMIT)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a safetensors file ({error}); copy the model again") from error
