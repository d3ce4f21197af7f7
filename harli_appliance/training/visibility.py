"""Which tokens of a packed sequence see which: earlier ones of their own example, as far as the layer looks back.

Knows a backbone's attention and how it is told; does not know units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harli_appliance.training.backbone import Backbone
from harli_appliance.training.packed_attention import Bounds


class Visibility:
    """Args: starts: for each token the index at which its example begins; int64 of shape [tokens]."""

    def __init__(self, backbone: Backbone, starts: Tensor) -> None:
        self._backbone = backbone
        self._starts = starts
        self._on_host: list[int] = starts.tolist()
        self._bounds = Bounds(self._on_host, starts.device) if backbone.kernels.packed_attention else None

    def first(self, layer: int, a: int) -> int:
        """The first token that window [a, ...) attends to: where token a's example or attention window begins."""
        window = self._backbone.windows[layer]
        return self._on_host[a] if window is None else max(self._on_host[a], a - window + 1)

    def window(self, layer: int, a: int, b: int) -> dict[str, Any]:
        """What a decoder layer is given for queries [a, b) and keys [first, b)."""
        window = self._backbone.windows[layer]
        if self._bounds is not None:
            earlier = None if window is None else window - 1
            return {
                "attention_mask": None,
                "packed": self._bounds.window(self.first(layer, a), a, b, earlier),
            }
        device = self._starts.device
        keys = torch.arange(self.first(layer, a), b, device=device)[None]
        queries = torch.arange(a, b, device=device)[:, None]
        seen = (keys <= queries) & (keys >= self._starts[a:b, None])
        if window is not None:
            seen &= keys > queries - window
        return {"attention_mask": self._backbone.attention_mask(seen)}
