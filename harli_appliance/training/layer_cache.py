"""What a decoder layer finds in place of transformers' cache while one window of tokens goes through it.

Keys and values of earlier windows go in, those of this one come out. Knows the calls that transformers' attention
makes; does not know where keys and values lie.
"""

from __future__ import annotations

from torch import Tensor, cat

from harli_appliance.training.projections import valued


class LayerCache:
    """Stands in for transformers' cache during one piece: earlier keys and values in, new ones out.

    Args:
        known: the window's own keys and values where they are known already; what the layer computes then only
            carries their gradient.
    """

    def __init__(self, past: tuple[Tensor, Tensor] | None, known: tuple[Tensor, Tensor] | None) -> None:
        self._past = past
        self._known = known
        self.keys: Tensor
        self.values: Tensor

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        if self._known is not None:
            keys, values = valued(self._known[0], keys), valued(self._known[1], values)
        if self._past is None:
            return keys, values
        return cat([self._past[0], keys], dim=2), cat([self._past[1], values], dim=2)

    def get_seq_length(self, *args: object) -> int:
        return 0 if self._past is None else self._past[0].shape[2]


class KvComputed(Exception):
    """The layer has got as far as its keys and values."""


class KvOnly:
    """Stands in for transformers' cache where nothing but keys and values is wanted."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object) -> None:
        self.keys, self.values = keys, values
        raise KvComputed

    def get_seq_length(self, *args: object) -> int:
        return 0
