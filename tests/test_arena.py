"""Arenas: tensors over consecutive slots are views of the buffers, in places of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harli_appliance.memory.arena import Arena, Form, slots_for

ROWS, WIDTH = 64, 6

forms = st.lists(
    st.builds(
        Form,
        st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    ),
    min_size=1,
    max_size=12,
)


@given(forms, st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=150, deadline=None)
def test_tensors_are_views_that_do_not_overlap(wanted: list[Form], count: int, dtype: torch.dtype) -> None:
    buffers = [torch.zeros(4 * ROWS * 9, WIDTH, dtype=dtype) for _ in range(count)]
    needed = slots_for(wanted, buffers)
    slots = torch.arange(3, 3 + needed)
    tensors = Arena(buffers, slots).carve(wanted)
    for index, (form, tensor) in enumerate(zip(wanted, tensors, strict=True)):
        assert tuple(tensor.shape) == form.shape
        assert tensor.dtype == form.dtype
        assert tensor.is_contiguous()
        tensor.fill_(index + 1)
    for index, tensor in enumerate(tensors):
        assert (tensor == index + 1).all(), "another tensor was written into this one"
    for buffer in buffers:
        assert not buffer[:3].any(), "slots before the lease were written"
        assert not buffer[3 + needed :].any(), "slots after the lease were written"
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} <= storages
    if needed > 1:
        with pytest.raises(ValueError, match="do not fit"):
            Arena(buffers, slots[:-1]).carve(wanted)


def test_slots_must_be_consecutive() -> None:
    with pytest.raises(ValueError, match="consecutive"):
        Arena([torch.zeros(ROWS, WIDTH)], torch.tensor([1, 2, 4]))


def test_little_is_wasted() -> None:
    """The tensors of a LoRA adapter of 30 layers: at most 2% more slots than their bytes."""
    shapes = [(16, 576), (576, 16), (16, 576), (192, 16), (16, 1536), (1536, 16)] * 30 * 5
    wanted = [Form(shape, torch.float32) for shape in shapes]
    buffers = [torch.empty(16384, 192, device="meta") for _ in range(60)]
    least = sum(form.bytes for form in wanted) / (60 * 192 * 4)
    assert slots_for(wanted, buffers) <= 1.02 * least + 1
