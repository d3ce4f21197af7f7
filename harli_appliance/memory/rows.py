"""Tensors that live in leased rows of the KV buffers, reached by index.

A slot has one row of width kv_heads x head_dim in every K and every V buffer. A `RowBlock` is a logical matrix
[rows, width] laid over the rows that some slots have in some buffers, in buffer-major order: row r lies in
buffer r // slots at slot r % slots. Any slots will do, so there is no fragmentation and nothing is remapped.
Reads copy into fresh workspace; writes scatter. Knows buffers and indices, not what the rows mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, index_select
from torch.nn.functional import pad


def rows_of(width: int, row_width: int) -> int:
    """Rows of `row_width` that one vector of `width` takes."""
    return -(-width // row_width)


class RowBlock:
    """A matrix of `rows` x `width` over leased rows.

    Args:
        buffers: tensors of shape [all slots, width].
        slots: int64 of shape [n]; the same slots are used in every buffer.
    """

    def __init__(self, buffers: Sequence[Tensor], slots: Tensor) -> None:
        self._buffers = tuple(buffers)
        self._slots = slots
        self._per_buffer = len(slots)
        self.width: int = buffers[0].shape[1]
        self.used = 0
        """Rows [0, used) have been written, or some of them."""

    @property
    def rows(self) -> int:
        return self._per_buffer * len(self._buffers)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as a new tensor of shape [stop - start, width]."""
        whole = self._buffers[0].new_empty(stop - start, self.width)
        for buffer, slots, offset in self._pieces(start, stop):
            index_select(buffer, 0, slots, out=whole[offset : offset + len(slots)])
        return whole

    def write(self, start: int, values: Tensor) -> None:
        """Store `values` of shape [n, width] in rows [start, start + n)."""
        self.used = max(self.used, start + len(values))
        for buffer, slots, offset in self._pieces(start, start + len(values)):
            buffer.index_copy_(0, slots, values[offset : offset + len(slots)])

    def read_wide(self, start: int, count: int, width: int) -> Tensor:
        """`count` vectors of `width`, each in as many whole rows as it needs, the first one from row `start` on; a
        tensor of shape [count, width]."""
        rows = self.read(start, start + count * rows_of(width, self.width))
        return rows.view(count, -1)[:, :width]

    def write_wide(self, start: int, vectors: Tensor) -> None:
        """Store `vectors` of shape [n, any width] as `read_wide` finds them."""
        missing = -vectors.shape[1] % self.width
        padded = pad(vectors, (0, missing)) if missing else vectors
        self.write(start, padded.reshape(-1, self.width))

    def add(self, start: int, values: Tensor) -> None:
        """Add `values` of shape [n, width] to rows [start, start + n)."""
        for buffer, slots, offset in self._pieces(start, start + len(values)):
            buffer.index_add_(0, slots, values[offset : offset + len(slots)])

    def zero(self, start: int, stop: int) -> None:
        self.used = max(self.used, stop)
        for buffer, slots, _ in self._pieces(start, stop):
            buffer.index_fill_(0, slots, 0.0)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(buffer, slots, offset in the request) for each buffer that rows [start, stop) touch."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows [{start}, {stop}) of a block of {self.rows}")
        row = start
        while row < stop:
            buffer, first = divmod(row, self._per_buffer)
            count = min(stop - row, self._per_buffer - first)
            yield self._buffers[buffer], self._slots[first : first + count], row - start
            row += count
