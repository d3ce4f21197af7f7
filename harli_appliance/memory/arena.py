"""Tensors of any shape laid over consecutive slots of the KV buffers, without copying.

Consecutive slots are, in each buffer, one region of memory: [slots, width] of the buffer's rows, flat. A tensor is
placed whole inside one buffer's region, so that it is an ordinary contiguous tensor whose bytes happen to lie in
KV-cache memory. Knows buffers, regions and sizes; does not know what the tensors are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which a tensor's place in its region is rounded up: a cache line."""


@dataclass(frozen=True, slots=True)
class Form:
    """Shape and element type of a tensor that is to be placed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """The memory of consecutive slots in some buffers.

    Args:
        buffers: contiguous tensors of shape [all slots, width].
        slots: int64 of shape [n], consecutive and ascending.

    Raises:
        ValueError: the slots are not consecutive.
    """

    def __init__(self, buffers: Sequence[Tensor], slots: Tensor) -> None:
        first = int(slots[0])
        if not torch.equal(slots, torch.arange(first, first + len(slots), device=slots.device)):
            raise ValueError("an arena needs consecutive slots")
        self._regions = [_aligned(buffer[first : first + len(slots)]) for buffer in buffers]

    def carve(self, forms: Sequence[Form]) -> list[Tensor]:
        """A tensor of each form, all in places of their own; what is in them is undefined.

        Raises:
            ValueError: they do not fit.
        """
        places = _pack([form.bytes for form in forms], [len(region) for region in self._regions])
        if places is None:
            raise ValueError(f"{len(forms)} tensors do not fit the slots; lease as many as `slots_for` says")
        return [
            self._regions[region][offset : offset + form.bytes].view(form.dtype).view(form.shape)
            for form, (region, offset) in zip(forms, places, strict=True)
        ]


def slots_for(forms: Sequence[Form], buffers: Sequence[Tensor]) -> int:
    """The fewest consecutive slots of `buffers` (as for `Arena`) that hold a tensor of each form."""
    sizes = [form.bytes for form in forms]
    rows = [buffer.shape[1] * buffer.dtype.itemsize for buffer in buffers]
    slots = max(
        -(-sum(sizes) // sum(rows)),
        -(-max(sizes, default=0) // max(rows)),
        1,
    )
    while _pack(sizes, [_room(slots * row) for row in rows]) is None:
        slots += 1
    return slots


def _room(size: int) -> int:
    """Bytes of a region that are left wherever it begins."""
    return max(0, size - ALIGNMENT + 1)


def _aligned(rows: Tensor) -> Tensor:
    """The bytes of some rows, from the first aligned one on."""
    region = rows.view(-1).view(torch.uint8)
    begin = -region.storage_offset() % ALIGNMENT
    return region[begin : begin + _room(len(region))]


def _pack(sizes: Sequence[int], room: Sequence[int]) -> list[tuple[int, int]] | None:
    """(region, offset) of each size, the largest placed first in the first region that has room; None if one has
    no place."""
    used = [0] * len(room)
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    smallest = min(sizes, default=0)
    first = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        for region in range(first, len(room)):
            if used[region] + size <= room[region]:
                places[index] = (region, used[region])
                used[region] += -(-size // ALIGNMENT) * ALIGNMENT
                break
        else:
            return None
        while first < len(room) and used[first] + smallest > room[first]:
            first += 1
    return places
