"""Everything that a micro-batch keeps between its units, in leased rows of the KV buffers.

Per token and layer the layer's input; for one layer at a time K, V and the gradients of its output, K and V. Where
windows go through all layers one after the other, K and V are kept of every layer instead. A hidden state takes
as many whole rows as its width needs. Knows rows and shapes; does not know in which order units use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harli_appliance.memory.rows import RowBlock, rows_of
from harli_appliance.training.backbone import Backbone

Buffers = tuple[Sequence[Tensor], Sequence[Tensor]]
"""K and V buffers, one tensor of shape [slots, kv_width] a layer each."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Slots that a micro-batch leases; see `footprint`."""

    kv: int
    hidden: int
    scratch: int

    @property
    def slots(self) -> int:
        return self.kv + self.hidden + self.scratch


def footprint(backbone: Backbone, tokens: int, *, keeps_kv: bool = False) -> Footprint:
    """Per token: hidden/(2 kv_width) slots of layer inputs (rounded up to whole rows), and K, V and the gradients
    of one layer's input, K and V spread over the rows of all layers.

    Args:
        keeps_kv: whether K and V are kept of every layer, for a slot more a token.
    """
    rows = rows_of(backbone.hidden_size, backbone.kv_width)
    all_layers = 2 * len(backbone.layers)
    at_a_time = rows + (2 if keeps_kv else 4)
    return Footprint(
        kv=tokens if keeps_kv else 0,
        hidden=-(-tokens * rows // 2),
        scratch=-(-tokens * at_a_time // all_layers),
    )


class Activations:
    """The rows of one micro-batch.

    Args:
        slots: leased slot indices, `footprint(...)`.slots of them.
        tokens: tokens of the micro-batch.
        keeps_kv: whether K and V are kept of every layer; otherwise those of the layer that was written last.

    Raises:
        ValueError: the lease is not of that size.
    """

    def __init__(
        self, backbone: Backbone, buffers: Buffers, slots: Tensor, tokens: int, *, keeps_kv: bool
    ) -> None:
        self._size = footprint(backbone, tokens, keeps_kv=keeps_kv)
        if len(slots) != self._size.slots:
            raise ValueError(f"{tokens} tokens need {self._size.slots} slots, got {len(slots)}")
        self._backbone = backbone
        self._buffers = buffers
        self.keeps_kv = keeps_kv
        self._per_hidden = rows_of(backbone.hidden_size, backbone.kv_width)
        begins = range(tokens * self._per_hidden, tokens * (self._per_hidden + 4), tokens)
        if keeps_kv:
            self._grad_k, self._grad_v = begins[:2]
        else:
            self._k, self._v, self._grad_k, self._grad_v = begins
        self._tokens = tokens
        self._lay(slots)

    def _lay(self, slots: Tensor) -> None:
        size = self._size
        kv, hidden, scratch = torch.split(slots, [size.kv, size.hidden, size.scratch])
        k_buffers, v_buffers = self._buffers
        layers = range(len(self._backbone.layers))
        kept = layers if self.keeps_kv else range(0)
        self._keys = [RowBlock([k_buffers[layer]], kv) for layer in kept]
        self._values = [RowBlock([v_buffers[layer]], kv) for layer in kept]
        self._inputs = [RowBlock([k_buffers[layer], v_buffers[layer]], hidden) for layer in layers]
        # One block holds, row after row: gradient (or final value) of the hidden states; K and V where these are
        # kept of one layer only; gradient of K, of V.
        self._scratch = RowBlock([*k_buffers, *v_buffers], scratch)

    def live_bytes(self, layers: int) -> int:
        """Bytes of the rows that have been written, of the first `layers` layers and of what is not a layer's."""
        row = self._backbone.kv_width * self._buffers[0][0].element_size()
        return row * sum(block.used for block in self._blocks(layers))

    def save(self, layers: int) -> list[Tensor]:
        """Copy those rows to host memory."""
        return [block.read(0, block.used).to("cpu") for block in self._blocks(layers)]

    def restore(self, slots: Tensor, layers: int, saved: Sequence[Tensor]) -> None:
        """Take other slots, as many as before, with the rows that `save` returned for as many layers."""
        self._lay(slots)
        for block, rows in zip(self._blocks(layers), saved, strict=True):
            block.write(0, rows.to(slots.device))

    def _blocks(self, layers: int) -> list[RowBlock]:
        return [*self._keys[:layers], *self._values[:layers], *self._inputs[:layers], self._scratch]

    # K and V are [1, kv heads, n, head size], as attention has them; hidden states are [n, hidden].

    def write_kv(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        if self.keeps_kv:
            self._keys[layer].write(start, kv_to_rows(keys))
            self._values[layer].write(start, kv_to_rows(values))
        else:
            self._scratch.write(self._k + start, kv_to_rows(keys))
            self._scratch.write(self._v + start, kv_to_rows(values))

    def kv(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of a layer that keeps them, or of the one that they were written of last."""
        if self.keeps_kv:
            keys, values = self._keys[layer].read(start, stop), self._values[layer].read(start, stop)
        else:
            keys = self._scratch.read(self._k + start, self._k + stop)
            values = self._scratch.read(self._v + start, self._v + stop)
        return kv_from_rows(keys, self._backbone), kv_from_rows(values, self._backbone)

    def write_input(self, layer: int, start: int, hidden: Tensor) -> None:
        """What a layer reads; one past the last layer is the model's final hidden state."""
        inputs = self._inputs[layer] if layer < len(self._inputs) else self._scratch
        self._write_hidden(inputs, start, hidden)

    def input(self, layer: int, start: int, stop: int) -> Tensor:
        return self._read_hidden(self._inputs[layer], start, stop)

    def write_output_gradient(self, start: int, gradient: Tensor) -> None:
        """Of the layer that is next to go backward; takes the place of the final hidden state."""
        self._write_hidden(self._scratch, start, gradient)

    def output_gradient(self, start: int, stop: int) -> Tensor:
        """The gradient, or the final hidden state where `write_output_gradient` was not called yet."""
        return self._read_hidden(self._scratch, start, stop)

    def clear_kv_gradients(self) -> None:
        self._scratch.zero(self._grad_k, self._grad_k + 2 * self._tokens)

    def add_kv_gradients(self, start: int, keys: Tensor, values: Tensor) -> None:
        self._scratch.add(self._grad_k + start, kv_to_rows(keys))
        self._scratch.add(self._grad_v + start, kv_to_rows(values))

    def kv_gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return (
            kv_from_rows(self._scratch.read(self._grad_k + start, self._grad_k + stop), self._backbone),
            kv_from_rows(self._scratch.read(self._grad_v + start, self._grad_v + stop), self._backbone),
        )

    def _read_hidden(self, block: RowBlock, start: int, stop: int) -> Tensor:
        return block.read_wide(start * self._per_hidden, stop - start, self._backbone.hidden_size)

    def _write_hidden(self, block: RowBlock, start: int, hidden: Tensor) -> None:
        block.write_wide(start * self._per_hidden, hidden)


def kv_from_rows(rows: Tensor, backbone: Backbone) -> Tensor:
    """[n, kv_width] rows to [1, kv heads, n, head size], a view."""
    return rows.view(1, len(rows), backbone.kv_heads, backbone.head_size).transpose(1, 2)


def kv_to_rows(states: Tensor) -> Tensor:
    """[1, kv heads, n, head size] to [n, kv_width] rows."""
    return states.detach()[0].transpose(0, 1).reshape(states.shape[2], -1)
