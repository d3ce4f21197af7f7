"""What attention on a CPU reads in a step: which cache rows, grouped how, hidden by which mask.

Made once a step from the batch alone, and used by all of its layers. Knows SGLang's table of cache rows; computes
no attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDED_TO_REAL = 1.25
"""Requests decode together while the rows gathered, padding included, stay below this multiple of the real."""
CHEAP_PADDING = 2**16
"""Padding of this many numbers costs no more than another group would."""
CACHED_NUMBERS = 2**19
"""K of a group has at most this many numbers (2 MiB in float32), to be in the core's cache still when read."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Requests of similar length that decode in one call.

    Attributes:
        begin, end: their range in the order of the plan.
        rows: cache rows, int32 of shape [(end - begin) * length]; padding repeats a request's first row.
        mask: 0 or -inf, shape [end - begin, 1, 1, length]; None without padding.
    """

    begin: int
    end: int
    length: int
    rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A decode step for one window size; `order` sorts the batch by length, None when one group holds it all."""

    groups: tuple[DecodeGroup, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ExtendRequest:
    """New tokens of one prompt.

    Attributes:
        begin, end: their range among the batch's tokens.
        rows: cache rows that they see, earlier ones first; None when they see nothing but themselves.
        mask: 0 or -inf, shape [end - begin, keys]; None when plain causal attention says it.
    """

    begin: int
    end: int
    rows: Tensor | None
    mask: Tensor | None


def plan_decode(
    table: Tensor, requests: Tensor, lengths: Sequence[int], *, window: int, width: int, dtype: torch.dtype
) -> DecodePlan:
    """Group a batch's requests and find their cache rows.

    Args:
        table: cache row of every request's every position, int32 [requests, positions].
        requests: the batch's lines in `table`, [batch].
        lengths: tokens of each request, the new one included.
        window: earlier tokens that the new one sees; -1 for all.
        width: numbers in a cache row of K.
    """
    seen = [length if window < 0 else min(length, window + 1) for length in lengths]
    order = sorted(range(len(seen)), key=seen.__getitem__, reverse=True)
    bounds = _group_bounds([seen[i] for i in order], width)
    if len(bounds) == 2:
        order = list(range(len(seen)))
    sizes = torch.tensor([seen[i] for i in order])
    first = torch.tensor([lengths[i] - seen[i] for i in order])
    position = torch.tensor(order)
    line = requests.long()[position]
    groups = []
    for begin, end in itertools.pairwise(bounds):
        size, start = sizes[begin:end, None], first[begin:end, None]
        length = int(size.max())
        column = torch.arange(length).expand(end - begin, length)
        padding = column >= size
        rows = table[line[begin:end, None], start + column.masked_fill(padding, 0)]
        mask = None
        if padding.any():
            mask = torch.zeros(end - begin, 1, 1, length, dtype=dtype)
            mask.masked_fill_(padding[:, None, None], float("-inf"))
        groups.append(DecodeGroup(begin, end, length, rows.reshape(-1), mask))
    if len(groups) == 1:
        return DecodePlan(tuple(groups))
    return DecodePlan(tuple(groups), position, torch.argsort(position))


def _group_bounds(lengths: Sequence[int], width: int) -> list[int]:
    """Where groups begin, and the end, for lengths sorted from the longest."""
    bounds, real = [0], 0
    for at, length in enumerate(lengths):
        begin = bounds[-1]
        longest, members = lengths[begin], at - begin + 1
        padded, wanted = members * longest, real + length
        wasteful = padded > PADDED_TO_REAL * wanted and (padded - wanted) * width > CHEAP_PADDING
        if at > begin and (wasteful or padded * width > CACHED_NUMBERS):
            bounds.append(at)
            real = 0
        real += length
    return [*bounds, len(lengths)]


def plan_extend(
    table: Tensor,
    requests: Sequence[int],
    prefixes: Sequence[int],
    extents: Sequence[int],
    *,
    window: int,
    masked: bool,
    dtype: torch.dtype,
) -> tuple[ExtendRequest, ...]:
    """Find what each prompt's new tokens see.

    Args:
        prefixes: tokens of each request that are in the cache already.
        extents: its new tokens, which are consecutive in the batch.
        window: earlier tokens that a token sees; -1 for all.
        masked: whether a mask is wanted even for plain causal attention.
    """
    plan, begin = [], 0
    for line, prefix, extent in zip(requests, prefixes, extents, strict=True):
        first = 0 if window < 0 else max(0, prefix - window)
        keys = torch.arange(first, prefix + extent)
        limited = 0 <= window < extent - 1
        mask = None
        if masked or limited or first < prefix:
            position = torch.arange(prefix, prefix + extent)[:, None]
            hidden = keys > position
            if window >= 0:
                hidden |= keys < position - window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        rows = table[line, first : prefix + extent] if first < prefix else None
        plan.append(ExtendRequest(begin, begin + extent, rows, mask))
        begin += extent
    return tuple(plan)
