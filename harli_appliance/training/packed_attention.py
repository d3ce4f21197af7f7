"""Attention of packed examples without a mask: torch's variable-length attention, which is FlashAttention.

A mask hides most pairs of a packed window and all are computed; here each example is a sequence of its own. An
example's last query stands at its last key, as FlashAttention aligns them, so that a window finds the keys of
earlier ones before its own. Knows torch; does not know layers.
"""

from __future__ import annotations

import inspect
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

NEEDED = ("scale", "window_size")
"""Arguments that torch's function has from 2.11 on."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Which of a window's tokens are whose; given as `packed` to a decoder layer, which passes it to attention.

    Attributes:
        queries, keys: where each example's begin among those of the window, and the end; int32 of shape
            [examples + 1].
        most_queries, most_keys: of one example.
        earlier: tokens before itself that a token attends to; None for all of its example.
        function: what computes it, torch's `varlen_attn`.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    earlier: int | None
    function: Callable[..., Tensor]


class Bounds:
    """Where the examples of a packed sequence begin and end.

    Args:
        starts: for each token the index at which its example begins.
    """

    def __init__(self, starts: Sequence[int], device: torch.device) -> None:
        self._bounds = [*sorted(set(starts)), len(starts)]
        self._on_device = torch.tensor(self._bounds, dtype=torch.int32, device=device)
        function = variable_length_attention()
        assert function is not None  # noqa: S101 - or nobody would have asked for it
        self._function = function  # looked up here, once for all layers and windows

    def window(self, first: int, a: int, b: int, earlier: int | None) -> Packed:
        """Of queries [a, b) and keys [first, b); `first` lies in the example of token a. Nothing waits for the
        device."""
        at, end = bisect_right(self._bounds, a) - 1, bisect_left(self._bounds, b)
        bounds, on_device = self._bounds[at : end + 1], self._on_device[at : end + 1]
        return Packed(
            on_device.clamp(a, b) - a,
            on_device.clamp(first, b) - first,
            _longest(bounds, a, b),
            _longest(bounds, first, b),
            earlier,
            self._function,
        )


def _longest(bounds: Sequence[int], start: int, stop: int) -> int:
    """Tokens in [start, stop) of the example that has most of them there."""
    inside = [min(max(bound, start), stop) for bound in bounds]
    return max(end - begin for begin, end in itertools.pairwise(inside))


def attend(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> Tensor:
    """Attention's output, of shape [1, n, heads, head size].

    Args:
        query: [1, heads, n, head size].
        key, value: [1, kv heads, keys, head size].
    """
    out = packed.function(
        *(rows[0].transpose(0, 1) for rows in (query, key, value)),
        packed.queries,
        packed.keys,
        packed.most_queries,
        packed.most_keys,
        scale=scale,
        window_size=(-1 if packed.earlier is None else packed.earlier, 0),
    )
    return out[None]


def variable_length_attention() -> Callable[..., Any] | None:
    """torch's, None where this torch has none that does what is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not all(name in known for name in NEEDED):
        return None
    # 2.11 does not ask whether heads share keys, 2.12 does.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn
