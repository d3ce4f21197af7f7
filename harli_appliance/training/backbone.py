"""The model that is finetuned: a transformers model on the runtime's weights, seen layer by layer.

Knows transformers and where its architectures differ. Does not know where the base weights come from, nor
adapters, units or memory.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harli_appliance.training.cross_entropy import CrossEntropy, cross_entropy_

Rotary = tuple[Tensor, Tensor]
"""cos and sin of shape [1, n, head size]."""

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Kernels:
    """What units compute with beside transformers' modules.

    Attributes:
        cross_entropy: of the loss pieces.
        packed_attention: whether attention is `packed_attention`'s, without masks.
        fused: what `fused_kernels` put in the place of transformers' and torch's own, by name.
    """

    cross_entropy: CrossEntropy = cross_entropy_
    packed_attention: bool = False
    fused: tuple[str, ...] = ()


class Backbone:
    """Decoder layers, embedding, norm and head of a transformers causal LM; what differs by architecture is here.

    Args:
        kernels: that its units compute with, see `fused_kernels`.

    Attributes:
        hidden_size: width of the residual stream.
        kv_width: kv_heads x head size, the width of one K or V row.
        heads: of queries.
        keeps_attention: whether layers take `kept_attention.Attended`.
        windows: for each layer, how many tokens a token attends to, itself included; None for all.
    """

    def __init__(self, model: Any, kernels: Kernels | None = None) -> None:
        self.model = model
        self.kernels = kernels or Kernels()
        self._decoder = model.model
        config = model.config
        self.hidden_size = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_size = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.kv_width = self.kv_heads * self.head_size
        self.vocabulary = int(config.vocab_size)
        self._layer_types = _layer_types(config)
        window: int | None = getattr(config, "sliding_window", None)
        self.windows = tuple(window if kind == SLIDING else None for kind in self._layer_types)
        self._rotary_by_type = not {FULL, SLIDING}.isdisjoint(config.rope_parameters or ())
        self._adds_mask = config._attn_implementation == "eager"
        on_cpu = self.device.type == "cpu" and self._decoder.norm.weight.dtype == torch.float32
        masked_sdpa = config._attn_implementation == "sdpa" and not self.kernels.packed_attention
        self.keeps_attention = on_cpu and masked_sdpa
        self._logit_cap = getattr(config, "final_logit_softcapping", None)

    def twin(self) -> Backbone:
        """The same layers again, on the same weights: what is put on one, like an adapter, the other does not see.

        Copies modules and no tensor: some megabytes for a model of any size.
        """
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return Backbone(copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors}), self.kernels)

    @property
    def device(self) -> torch.device:
        found: torch.device = self._decoder.norm.weight.device
        return found

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self._decoder.layers
        return layers

    def embed(self, tokens: Tensor) -> Tensor:
        """[n] token ids to [n, hidden]."""
        out: Tensor = self._decoder.embed_tokens(tokens)
        return out

    def rotary(self, positions: Tensor) -> tuple[Rotary, ...]:
        """Each layer's cos and sin for positions of shape [n]; layers of one type share theirs."""
        like, rows = self._decoder.norm.weight, positions[None]
        if not self._rotary_by_type:
            return (self._decoder.rotary_emb(like, rows),) * len(self._layer_types)
        made = {kind: self._decoder.rotary_emb(like, rows, kind) for kind in set(self._layer_types)}
        return tuple(made[kind] for kind in self._layer_types)

    def attention_mask(self, seen: Tensor) -> Tensor:
        """The mask as attention takes it, of shape [1, 1, queries, keys]; `seen` is [queries, keys], bool."""
        if self._adds_mask:
            lowest = torch.finfo(self._decoder.norm.weight.dtype).min
            zeros = torch.zeros(seen.shape, dtype=self._decoder.norm.weight.dtype, device=seen.device)
            seen = zeros.masked_fill_(~seen, lowest)
        return seen[None, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] output of the last layer to [n, vocabulary]."""
        out: Tensor = self.model.lm_head(self._decoder.norm(hidden))
        if self._logit_cap is not None:
            out = torch.tanh(out / self._logit_cap) * self._logit_cap
        return out


def _layer_types(config: Any) -> tuple[str, ...]:
    """Mistral's configuration has a window and no types: every layer slides."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return tuple(types)
    slides = getattr(config, "sliding_window", None) is not None
    return (SLIDING if slides else FULL,) * int(config.num_hidden_layers)
