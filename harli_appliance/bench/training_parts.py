"""The contenders of ``harli bench training``: one optimizer step on one sequence, by units and by PEFT alone.

All have the same model, adapter, tokens and AdamW, and learn every token of the sequence. Knows no goals and
prints nothing.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from harli_appliance.bench.training import SPARED, WINDOWS
from harli_appliance.errors import HarliError
from harli_appliance.training.activations import footprint
from harli_appliance.training.adapter import TARGETS, Adapter
from harli_appliance.training.adapter_state import AdapterState
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.kept_outputs import kept_slots
from harli_appliance.training.objectives import Likelihood
from harli_appliance.training.packing import EncodedExample, pack
from harli_appliance.training.units import MicroBatch

RANK = 16
ALPHA = 32
RATE = 1e-4
LOSS_TOKENS = 128
"""Tokens whose logits exist at a time."""
WARM_TOKENS = 16
"""A step on so few tokens loads what torch loads when first used, before memory is measured."""


class Contender(Protocol):
    """A way to train one sequence; `step` is one optimizer step and gives its loss."""

    def step(self) -> float: ...


class Units:
    """Work units, with what they keep in rows of KV buffers that hold nothing else.

    Args:
        spared: whether slots lie idle, in which all layers' outputs can be kept, and windows are wide.
    """

    def __init__(self, model: Any, tokens: Tensor, *, spared: bool = False) -> None:
        self._backbone = Backbone(model)
        self._adapter = Adapter(self._backbone, rank=RANK, alpha=ALPHA, seed=0)
        self._window = WINDOWS[SPARED if spared else "ours"]
        count = len(tokens)
        (self._sequence,) = pack([EncodedExample(tuple(tokens.tolist()), (True,) * count)], count)
        slots = footprint(self._backbone, count).slots
        layers = len(self._backbone.layers)
        kept = kept_slots(self._backbone, self._adapter.projections, count) if spared else 0
        self._slots, self._spared = torch.arange(slots), torch.arange(slots, slots + layers * kept)
        # Not filled: memory that nothing was written to is no memory yet.
        keys, values = (
            [torch.empty(slots + layers * kept, self._backbone.kv_width) for _ in range(layers)] for _ in "kv"
        )
        self._buffers = keys, values
        self._optimizer = torch.optim.AdamW(self._adapter.parameters(), lr=RATE, weight_decay=0.0)
        trained = [self._adapter.parameters(layer) for layer in range(layers)]
        self._state = AdapterState(trained, self._optimizer, [*keys, *values])

    def step(self) -> float:
        batch = MicroBatch(
            self._backbone,
            self._adapter,
            self._sequence,
            buffers=self._buffers,
            slots=self._slots,
            objective=Likelihood(float(self._sequence.weights.sum())),
            loss_tokens=LOSS_TOKENS,
            dropout_key=0,
            gradients=self._state.gradients,
        )
        if len(self._spared):
            batch.keep_outputs(self._spared.chunk(len(self._backbone.layers)))
        while (unit := batch.next_unit(self._window, layers=1)) is not None:
            unit.run()
        self._optimizer.step()
        self._state.begin_step()
        return batch.loss


class Peft:
    """PEFT on transformers' own model and loss.

    Args:
        checkpointing: compute each layer's forward pass again in the backward pass, as transformers offers it.
    """

    def __init__(self, model: Any, tokens: Tensor, *, checkpointing: bool) -> None:
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        self._peft: Any = get_peft_model(model, config)
        self._peft.train()  # transformers computes layers again only of a model that learns
        if checkpointing:
            self._peft.gradient_checkpointing_enable({"use_reentrant": False})
        learned = [p for p in self._peft.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
        self._tokens = tokens[None]

    def step(self) -> float:
        loss = self._peft(self._tokens, labels=self._tokens, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


CONTENDERS: dict[str, Callable[[Any, Tensor], Contender]] = {
    "plain": lambda model, tokens: Peft(model, tokens, checkpointing=False),
    SPARED: lambda model, tokens: Units(model, tokens, spared=True),
    "ours": Units,
    "checkpointing": lambda model, tokens: Peft(model, tokens, checkpointing=True),
}


def memory(folder: Path, name: str, tokens: int) -> dict[str, float]:
    """Peak of this process's memory above the loaded model, over one whole optimizer step, in MiB.

    It holds everything that training adds: adapter, gradients, moments, activations (for ours: the rows that an
    appliance would lease) and what the allocator wastes.
    """
    warm = _load(folder)
    CONTENDERS[name](warm, _tokens(warm, WARM_TOKENS)).step()
    del warm
    model = _load(folder)
    before = _settled()
    loss = CONTENDERS[name](model, _tokens(model, tokens)).step()
    return {"peak_mib": _status("VmHWM") - before, "loss": loss, "formula_mib": _formula(model, tokens)}


def speed(folder: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of whole optimizer steps of each contender; they take turns in one process. A first round, in which
    each loads what it needs, is not told."""
    made = {}
    for name, build in CONTENDERS.items():
        model = _load(folder)
        made[name] = build(model, _tokens(model, tokens))
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(1 + rounds):
        for name, contender in made.items():
            began = time.perf_counter()
            contender.step()
            times[name].append(time.perf_counter() - began)
    return {name: taken[1:] for name, taken in times.items()}


def _load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # from a mapped file, of which only what was touched counts
    return model.requires_grad_(False)


def _tokens(model: Any, count: int) -> Tensor:
    """Random token ids of shape [count], always the same."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(6, int(model.config.vocab_size), (count,), generator=generator)


def _formula(model: Any, tokens: int) -> float:
    """What training must keep: per token and layer the layer's input, K and V. In MiB."""
    backbone = Backbone(model)
    width = backbone.hidden_size + 2 * backbone.kv_width
    return tokens * len(backbone.layers) * width * torch.float32.itemsize / 2**20


def _settled() -> float:
    """Memory of this process in MiB once all that is free has gone back; its peak counts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    return _status("VmRSS")


def _status(name: str) -> float:
    """A number of /proc/self/status that is given in kB, in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise HarliError(f"/proc/self/status has no {name}; measure on Linux")
    return int(found[1]) / 1024
