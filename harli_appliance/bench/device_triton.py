"""A Triton kernel, to see in which partition Triton's kernels run. A file of its own: Triton reads its source."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _scale(data, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(data + at, tl.load(data + at, mask=inside) * 1.0001, mask=inside)


def scale(data: torch.Tensor) -> None:
    """Multiply a contiguous float32 tensor, in place, on the current stream."""
    _scale[(triton.cdiv(data.numel(), BLOCK),)](data, data.numel(), BLOCK=BLOCK)
