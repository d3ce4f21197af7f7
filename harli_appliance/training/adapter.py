"""The LoRA adapter of one finetuning job, on the layers of a backbone.

Knows PEFT, its file format and which parameters belong to which decoder layer. Does not know units, optimizers
or jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from harli_appliance.training.backbone import Backbone

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter:
    """A LoRA adapter under training on a backbone; `detach` takes it off again.

    Args:
        seed: draws the A matrices (B starts at zero), independent of any global generator.
    """

    def __init__(self, backbone: Backbone, *, rank: int, alpha: float, seed: int) -> None:
        self._config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        self._peft: Any = get_peft_model(backbone.model, self._config)
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
        config = self._config
        config.inference_mode = True
        config.save_pretrained(folder)

    def detach(self) -> None:
        """Remove the adapter; the backbone is as it was."""
        self._peft.unload()
