"""An adapter under training: PEFT's modules on the layers of a backbone, ours where PEFT draws random numbers.

Knows PEFT, its file format and which parameters belong to which decoder layer. Does not know units, optimizers
or jobs.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from harli_appliance.schema import TARGET_MODULES, PeftMethod
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.dropout import DropoutStream, TokenDropout, token_keys
from harli_appliance.training.projections import ONLY, projections

TARGETS = TARGET_MODULES
FEEDFORWARD = "down_proj"
"""IA3 scales this one's input, and the output of every other projection (Liu et al. 2022, arXiv 2205.05638)."""


class Adapter:
    """A LoRA, rsLoRA, DoRA or IA3 adapter, on the backbone until `detach`.

    Args:
        targets: projections that are adapted, of `TARGETS`.
        rank, alpha: of LoRA and DoRA.
        seed: draws the A matrices (B starts at zero), independent of any global generator.
        rslora: scale by alpha / sqrt(rank) in place of alpha / rank (rsLoRA, arXiv 2312.03732).
        dropout: share of A's inputs that is dropped within `applied`, in [0, 1); not for IA3, which has no A.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        alpha: float,
        seed: int,
        method: PeftMethod = "lora",
        targets: Sequence[str] = TARGETS,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self._device = backbone.device
        self._config = _config(method, list(targets), rank, alpha, rslora, dropout)
        self._peft: Any = get_peft_model(backbone.model, self._config)
        self._stream = DropoutStream()
        self._tuners: list[list[Any]] = [
            [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
            for layer in backbone.layers
        ]
        self._draw(seed)
        if dropout and method != "ia3":
            for salt, tuner in enumerate(itertools.chain(*self._tuners)):
                tuner.lora_dropout[ONLY] = TokenDropout(dropout, salt, self._stream)
        self._layers: list[list[nn.Parameter]] = [
            [p for p in layer.parameters() if p.requires_grad] for layer in backbone.layers
        ]
        self.projections = [projections(layer) for layer in backbone.layers]
        """Each layer's, as computing it again needs them."""

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._peft.named_parameters():
            if "lora_A" in name:
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                with torch.no_grad():
                    parameter.copy_(drawn)

    @property
    def peft_model(self) -> Any:
        """PEFT's own model, for comparison with plain backpropagation."""
        return self._peft

    def parameters(self, layer: int | None = None) -> list[nn.Parameter]:
        """Trained parameters of one decoder layer, or of all in layer order."""
        if layer is not None:
            return self._layers[layer]
        return [p for parameters in self._layers for p in parameters]

    @contextmanager
    def applied(self, layer: int, tuned: bool, key: int | None, start: int, stop: int) -> Iterator[None]:
        """While one layer computes tokens [start, stop) of a sequence: adapted or, not `tuned`, as the base.

        Args:
            key: draws the masks of dropout, see `dropout.sequence_key`; None drops nothing.
        """
        if not tuned:
            self._switch(layer, off=True)
        try:
            with self.dropping(key, start, stop):
                yield
        finally:
            if not tuned:
                self._switch(layer, off=False)

    @contextmanager
    def dropping(self, key: int | None, start: int, stop: int) -> Iterator[None]:
        """While tokens [start, stop) of a sequence are computed, with the masks that `key` draws for them."""
        rows = None if key is None else token_keys(key, start, stop, self._device)
        self._dropping(rows)
        try:
            yield
        finally:
            self._dropping(None)

    def _dropping(self, rows: Tensor | None) -> None:
        self._stream.rows = rows
        if self._config.peft_type == "LORA" and self._config.use_dora:
            # DoRA has a shorter way to the same numbers without dropout, which it takes when not training.
            for tuner in itertools.chain(*self._tuners):
                tuner.training = rows is not None

    def _switch(self, layer: int, *, off: bool) -> None:
        # PEFT's own switch also turns `requires_grad` of every parameter over.
        for tuner in self._tuners[layer]:
            tuner._disable_adapters = off

    def state(self) -> dict[str, Tensor]:
        """Trained tensors by PEFT's names (views, not copies)."""
        state: dict[str, Tensor] = get_peft_model_state_dict(self._peft)
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        set_peft_model_state_dict(self._peft, dict(state))

    def save(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in PEFT's format."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in self.state().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(self._config)
        config.inference_mode = True
        if getattr(config, "use_rslora", False):
            # SGLang scales by alpha / rank whatever the file says; so written, every reader does what was trained.
            config.lora_alpha *= math.sqrt(config.r)
            config.use_rslora = False
        config.save_pretrained(folder)

    def detach(self) -> None:
        """Remove the adapter; the backbone is as it was."""
        self._peft.unload()


def _config(
    method: PeftMethod, targets: list[str], rank: int, alpha: float, rslora: bool, dropout: float
) -> Any:
    if method == "ia3":
        return IA3Config(
            target_modules=targets,
            feedforward_modules=[name for name in targets if name == FEEDFORWARD],
            task_type="CAUSAL_LM",
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=method == "dora",
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
