"""Row blocks: a matrix laid over scattered rows reads back what was written, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harli_appliance.memory.rows import RowBlock

WIDTH = 3
SLOTS = 20


@given(
    buffers=st.integers(1, 4),
    per_buffer=st.integers(1, 7),
    writes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12), st.booleans()), max_size=6),
    seed=st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_it_behaves_like_a_matrix(
    buffers: int, per_buffer: int, writes: list[tuple[int, int, bool]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = [torch.randn(SLOTS, WIDTH, generator=generator) for _ in range(buffers)]
    before = [buffer.clone() for buffer in memory]
    slots = torch.randperm(SLOTS, generator=generator)[:per_buffer]
    block = RowBlock(memory, slots)
    block.zero(0, block.rows)
    matrix = torch.zeros(block.rows, WIDTH)
    for at, length, add in writes:
        start = min(at, block.rows)
        stop = min(start + length, block.rows)
        values = torch.randn(stop - start, WIDTH, generator=generator)
        if add:
            block.add(start, values)
            matrix[start:stop] += values
        else:
            block.write(start, values)
            matrix[start:stop] = values
    assert torch.equal(block.read(0, block.rows), matrix)
    untouched = [s for s in range(SLOTS) if s not in slots.tolist()]
    for buffer, original in zip(memory, before, strict=True):
        assert torch.equal(buffer[untouched], original[untouched])


def test_rows_outside_are_refused() -> None:
    block = RowBlock([torch.zeros(SLOTS, WIDTH)], torch.arange(4))
    with pytest.raises(IndexError):
        block.read(2, 5)
    with pytest.raises(IndexError):
        block.write(3, torch.zeros(2, WIDTH))
