"""What a layer's frozen projections gave in its forward pass, kept for its backward pass in slots that are spared.

Backward computes a layer's forward again, which is a quarter of all multiplications. With the projections'
outputs, K, V and (on a CPU) what attention gave at hand, next to none are left to do. They take many slots (in
SmolLM2-135M 14 a token for all layers, nine times the rest), so they are kept only where slots lie idle, layer by
layer, and may be taken away between any two units: then the layer is computed again, to the same values bit for
bit as long as the windows are the same. Knows projections and rows; does not know leases or the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from harli_appliance.memory.rows import RowBlock, rows_of
from harli_appliance.training.activations import Buffers, kv_from_rows, kv_to_rows
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.kept_attention import Attended
from harli_appliance.training.projections import Forwards, Projection, Projections


def kept_slots(backbone: Backbone, layers: Sequence[Projections], tokens: int) -> int:
    """Slots that one layer's outputs, K and V take, with a row in each of all layers' buffers."""
    rows = max(
        sum(rows_of(projection.base.out_features, backbone.kv_width) for projection in layer.kept)
        for layer in layers
    )
    return -(-tokens * (rows + 2 + sum(_attention_rows(backbone))) // (2 * len(backbone.layers)))


def _attention_rows(backbone: Backbone) -> tuple[int, int]:
    """Rows a token of what attention gives, and of the logarithms of its sums."""
    if not backbone.keeps_attention:
        return 0, 0
    width = backbone.kv_width
    return rows_of(backbone.heads * backbone.head_size, width), rows_of(backbone.heads, width)


class KeptOutputs:
    """Those of one micro-batch.

    Args:
        layers: each layer's projections.
        tokens: of the micro-batch.
    """

    def __init__(
        self, backbone: Backbone, layers: Sequence[Projections], buffers: Buffers, tokens: int
    ) -> None:
        self._layers = layers
        self._backbone = backbone
        self._buffers = [*buffers[0], *buffers[1]]
        self._tokens = tokens
        self._blocks: dict[int, RowBlock] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._blocks

    def lend(self, layer: int, slots: Tensor) -> None:
        """Keep a layer's from now on; its forward pass has not begun.

        Args:
            slots: `kept_slots(...)` of them.
        """
        self._blocks[layer] = RowBlock(self._buffers, slots)

    def drop(self, layer: int) -> None:
        """Forget a layer's, if they were kept."""
        self._blocks.pop(layer, None)

    def clear(self) -> None:
        self._blocks.clear()

    def keeping(self, layer: int, start: int) -> Forwards:
        """For `projections.replaced`, while tokens from `start` on go forward: what projections give is kept."""
        return self._forwards(layer, start, self._keep)

    def known(self, layer: int, start: int) -> Forwards:
        """For `projections.replaced`, while tokens from `start` on go backward: what was kept is not computed."""
        return self._forwards(layer, start, self._known)

    def write_kv(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Each of shape [1, kv heads, n, head size]; nothing happens where the layer is not kept."""
        if layer in self._blocks:
            self._blocks[layer].write(start, kv_to_rows(keys))
            self._blocks[layer].write(self._tokens + start, kv_to_rows(values))

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of all tokens of a layer that is kept."""
        block = self._blocks[layer]
        keys, values = block.read(0, self._tokens), block.read(self._tokens, 2 * self._tokens)
        return kv_from_rows(keys, self._backbone), kv_from_rows(values, self._backbone)

    def attended(self, layer: int, start: int, stop: int, *, known: bool) -> Attended | None:
        """What attention gave or gives for tokens [start, stop); None where it is not kept."""
        rows, sum_rows = _attention_rows(self._backbone)
        if layer not in self._blocks or not rows:
            return None
        block, heads, count = self._blocks[layer], self._backbone.heads, stop - start
        at = 2 * self._tokens + start * rows
        sums_at = (2 + rows) * self._tokens + start * sum_rows
        if known:
            out = block.read_wide(at, count, heads * self._backbone.head_size).view(1, count, heads, -1)
            sums = block.read_wide(sums_at, count, heads)
            return Attended(known=(out.transpose(1, 2), sums.t()[None].contiguous()))

        def keep(out: Tensor, sums: Tensor) -> None:
            block.write_wide(at, out[0].transpose(0, 1).reshape(count, -1))
            block.write_wide(sums_at, sums[0].t())

        return Attended(keep=keep)

    def _forwards(self, layer: int, start: int, forward: Callable[..., Tensor]) -> Forwards:
        """`forward` of each projection, with the row of token `start`: rows hold K, V, attention, then one
        projection after the other. Nothing where the layer is not kept."""
        made: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        if layer not in self._blocks:
            return made
        block, row = self._blocks[layer], (2 + sum(_attention_rows(self._backbone))) * self._tokens
        for projection in self._layers[layer].kept:
            rows = rows_of(projection.base.out_features, self._backbone.kv_width)
            made[projection.module] = partial(forward, block, projection, row + start * rows)
            row += rows * self._tokens
        return made

    @staticmethod
    def _keep(block: RowBlock, projection: Projection, row: int, x: Tensor) -> Tensor:
        out = projection.value(x)
        block.write_wide(row, out[0])
        return out

    @staticmethod
    def _known(block: RowBlock, projection: Projection, row: int, x: Tensor) -> Tensor:
        value = block.read_wide(row, x.shape[1], projection.base.out_features)
        return projection.given(x, value[None])
