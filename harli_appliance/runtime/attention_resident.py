"""K and V of a batch that decodes on unchanged, kept in the order in which attention reads them.

SGLang's cache holds a request's tokens in rows anywhere; gathering them takes about as long as attention itself.
While the same requests decode step after step, their gathered rows stay, and a step adds one row to each. Only
decode steps in succession can use this: anything else (a prompt, another batch) ends it, and the rows are gathered
again from the cache, which stays the truth. Knows shapes and lengths; does not know SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harli_appliance.runtime.attention_plan import DecodeGroup, DecodePlan

ROOM = 64
"""Tokens that requests may grow by before their rows are gathered again."""
ALIGNMENT = 64

Gather = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cache rows to K and V, [rows, heads, d] each."""


@dataclass(frozen=True, slots=True)
class Read:
    """What requests `begin` to `end` of a plan's order read.

    Attributes:
        k, v: [members, heads, tokens, d].
        mask: 0 or -inf, [members, 1, 1, tokens]; None without padding.
    """

    begin: int
    end: int
    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Reads:
    """All that a layer reads in a decode step."""

    parts: Iterable[Read]
    plan: DecodePlan


class _Group:
    """A group of the plan, growing by one token a step up to its capacity."""

    def __init__(self, group: DecodeGroup, lengths: Sequence[int]) -> None:
        self.begin, self.end, self.rows = group.begin, group.end, group.rows
        self.members = group.end - group.begin
        self.length = group.length
        self.capacity = group.length + ROOM
        self._member = torch.arange(self.members)
        self._newest = torch.tensor(lengths) - 1
        self._mask: Tensor | None = None
        if group.mask is not None:
            self._mask = group.mask.new_full((self.members, 1, 1, self.capacity), float("-inf"))
            self._mask[..., : self.length] = group.mask

    @property
    def padded(self) -> bool:
        return self._mask is not None

    @property
    def mask(self) -> Tensor | None:
        return None if self._mask is None else self._mask[..., : self.length]

    def grow(self) -> None:
        self.length += 1
        self._newest += 1
        if self._mask is not None:
            self._mask[self._member, 0, 0, self._newest] = 0.0

    def newest(self, heads: int) -> Tensor:
        """Where the newest rows lie in [members * heads * capacity, d]."""
        line = torch.arange(self.members * heads) * self.capacity
        return line + self._newest.repeat_interleave(heads)


@dataclass(slots=True)
class _Batch:
    """The batch that is held; a layer's tensors are [members, heads, capacity, d] for each group."""

    plan: DecodePlan
    groups: tuple[_Group, ...]
    layers: dict[int, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict)
    newest: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """By number of heads, for this step."""
    fresh: bool = True
    """Whether this is the step in which it was made: layers join now or never."""


class ResidentKV:
    """Gathered rows of the running batch.

    Args:
        budget: bytes that may be held in all; layers that do not fit are refused.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        # Kept when a batch ends: fresh pages from the operating system cost more than the copying.
        self._memory: Tensor | None = None
        self._taken = 0
        self._lines: list[int] = []
        self._lengths: list[int] = []
        self._steady = False
        self._batch: _Batch | None = None

    def forget(self) -> None:
        """Something other than a decode step ran."""
        self._lines, self._lengths, self._steady, self._batch = [], [], False, None

    def follow(self, lines: list[int], lengths: list[int]) -> None:
        """A decode step begins, for requests `lines` of these lengths (the new token included)."""
        self._steady = lines == self._lines and lengths == [length + 1 for length in self._lengths]
        self._lines, self._lengths = lines, lengths
        batch = self._batch
        if not self._steady or (batch and any(group.length == group.capacity for group in batch.groups)):
            self._batch = None
        elif batch is not None:
            batch.fresh = False
            batch.newest.clear()
            for group in batch.groups:
                group.grow()

    def layer(
        self, layer: int, k: Tensor, v: Tensor, plan: Callable[[], DecodePlan], gather: Gather
    ) -> Reads | None:
        """A layer's rows, the new ones included; None when they are not held and must be gathered.

        A batch is held from its second step in succession, so that one which changes in every step costs nothing.

        Args:
            k, v: the new rows, one for each request, heads x d numbers each.
            plan: of this step, without a window.
            gather: reads this layer's cache, the new rows already in it.
        """
        if not self._steady:
            return None
        if self._batch is None:
            self._batch = self._begin(plan())
        batch = self._batch
        if layer in batch.layers:
            self._add(batch, layer, k, v)
        elif not (batch.fresh and self._fill(batch, layer, gather)):
            return None
        parts = tuple(
            Read(group.begin, group.end, keys[:, :, : group.length], values[:, :, : group.length], group.mask)
            for group, (keys, values) in zip(batch.groups, batch.layers[layer], strict=True)
        )
        return Reads(parts, batch.plan)

    def _begin(self, plan: DecodePlan) -> _Batch:
        self._taken = 0
        order = plan.order.tolist() if plan.order is not None else range(len(self._lengths))
        lengths = [self._lengths[at] for at in order]
        return _Batch(plan, tuple(_Group(group, lengths[group.begin : group.end]) for group in plan.groups))

    def _fill(self, batch: _Batch, layer: int, gather: Gather) -> bool:
        tensors = []
        arena: Tensor | None = None
        begin = 0
        for group in batch.groups:
            found = gather(group.rows)
            heads, size = found[0].shape[1:]
            if arena is None:
                numbers = 2 * heads * size * sum(each.members * each.capacity for each in batch.groups)
                arena = self._take(numbers, found[0].dtype)
                if arena is None:
                    return False
            shape = (group.members, heads, group.capacity, size)
            pair = []
            for rows in found:
                count = group.members * heads * group.capacity * size
                held = arena[begin : begin + count].view(shape)
                begin += count
                held[:, :, : group.length] = rows.view(group.members, -1, heads, size).transpose(1, 2)
                if group.padded:
                    held[:, :, group.length :] = 0.0  # hidden from attention, but not from NaN
                pair.append(held)
            tensors.append((pair[0], pair[1]))
        batch.layers[layer] = tuple(tensors)
        return True

    def _take(self, numbers: int, dtype: torch.dtype) -> Tensor | None:
        """Memory that is this batch's until it ends; pages are touched, and then kept, as they are needed."""
        begin, end = self._taken, self._taken + numbers * dtype.itemsize
        if end > self._budget:
            return None
        if self._memory is None:
            self._memory = torch.empty(self._budget, dtype=torch.uint8)
        self._taken = -(-end // ALIGNMENT) * ALIGNMENT
        return self._memory[begin:end].view(dtype)

    def _add(self, batch: _Batch, layer: int, k: Tensor, v: Tensor) -> None:
        requests = len(self._lines)
        k, v = k.reshape(requests, -1), v.reshape(requests, -1)
        if batch.plan.order is not None:
            k, v = k[batch.plan.order], v[batch.plan.order]
        heads, size = batch.layers[layer][0][0].shape[1], batch.layers[layer][0][0].shape[3]
        if heads not in batch.newest:
            batch.newest[heads] = tuple(group.newest(heads) for group in batch.groups)
        for group, pair, at in zip(batch.groups, batch.layers[layer], batch.newest[heads], strict=True):
            for held, new in zip(pair, (k, v), strict=True):
                rows = new[group.begin : group.end].reshape(-1, size)
                held.view(-1, size).index_copy_(0, at, rows)
