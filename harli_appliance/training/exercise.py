"""Work that loads the training lane as a work unit does, without a job: what a calibration runs beside steps.

One decoder layer forward and backward over a window of random hidden states; the next unit takes the next
layer, so that weights are read from memory as in training. Knows layers; does not know adapters, leases or
lanes.
"""

from __future__ import annotations

from typing import Any

import torch

from harli_appliance.training.backbone import Backbone
from harli_appliance.training.pace import BACKWARD, FORWARD
from harli_appliance.training.visibility import Visibility


class Exercise:
    """Call it for one unit; on the training lane.

    Args:
        tokens: of the window.
    """

    def __init__(self, backbone: Backbone, tokens: int) -> None:
        self._backbone = backbone
        self._positions = torch.arange(tokens, device=backbone.device)
        self._visibility = Visibility(backbone, torch.zeros_like(self._positions))
        self._layer = 0

    @property
    def tokens(self) -> float:
        """Whole tokens' work of one unit. Forward and the gradient of the hidden states are 4 of the 6 FLOPs a
        parameter of a token that is trained: the backward pass of a work unit computes its layer again."""
        return len(self._positions) * (FORWARD + BACKWARD / 2) / len(self._backbone.layers)

    def __call__(self) -> None:
        number = self._layer
        self._layer = (number + 1) % len(self._backbone.layers)
        tokens = len(self._positions)
        layer: Any = self._backbone.layers[number]
        weight = next(layer.parameters())
        hidden = torch.randn(1, tokens, self._backbone.hidden_size, dtype=weight.dtype, device=weight.device)
        hidden.requires_grad_()
        with torch.enable_grad():
            out = layer(
                hidden,
                position_ids=self._positions[None],
                position_embeddings=self._backbone.rotary(self._positions)[number],
                **self._visibility.window(number, 0, tokens),
            )
            torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), hidden)
