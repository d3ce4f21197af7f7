"""The LoRA adapter of one finetuning job, on the layers of a backbone.

Knows PEFT, its file format and which parameters belong to which decoder layer. Does not know units, optimizers
or jobs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from harli_appliance.training.backbone import Backbone
from harli_appliance.training.dropout import DropoutStream, TokenDropout, token_keys

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONLY = "default"
"""PEFT's own name for the only adapter of a model."""


class Adapter:
    """A LoRA adapter under training on a backbone; `detach` takes it off again.

    Args:
        seed: draws the A matrices (B starts at zero), independent of any global generator.
        rslora: scale by alpha / sqrt(rank) in place of alpha / rank (rsLoRA, arXiv 2312.03732).
        dropout: share of A's inputs that is dropped within `dropping`, in [0, 1).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        alpha: float,
        seed: int,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self._config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            lora_dropout=dropout,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
        self._device = backbone.device
        self._peft: Any = get_peft_model(backbone.model, self._config)
        self._stream = DropoutStream()
        if dropout:
            tuners = [module for module in self._peft.modules() if isinstance(module, LoraLayer)]
            for salt, tuner in enumerate(tuners):
                tuner.lora_dropout[ONLY] = TokenDropout(dropout, salt, self._stream)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._peft.named_parameters():
            if "lora_A" in name:
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                with torch.no_grad():
                    parameter.copy_(drawn)
        self._layers: list[list[nn.Parameter]] = [
            [p for p in layer.parameters() if p.requires_grad] for layer in backbone.layers
        ]

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
    def dropping(self, key: int, start: int, stop: int) -> Iterator[None]:
        """While tokens [start, stop) of a sequence are computed, with the masks that `key` draws for them."""
        self._stream.rows = token_keys(key, start, stop, self._device)
        try:
            yield
        finally:
            self._stream.rows = None

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
        if config.use_rslora:
            # SGLang scales by alpha / rank whatever the file says; so written, every reader does what was trained.
            config.lora_alpha *= math.sqrt(config.r)
            config.use_rslora = False
        config.save_pretrained(folder)

    def detach(self) -> None:
        """Remove the adapter; the backbone is as it was."""
        self._peft.unload()
