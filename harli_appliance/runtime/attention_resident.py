"""K and V of a batch that decodes on unchanged, kept in the order in which attention reads them.

SGLang's cache holds a request's tokens in rows anywhere; gathering them takes about as long as attention itself.
While the same requests decode step after step, their gathered rows stay, and a step adds one row to each. Only
decode steps in succession can use this: anything else (a prompt, another batch) ends it, and the rows are gathered
again from the cache, which stays the truth. Knows shapes and lengths; does not know SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harli_appliance.runtime.attention_plan import DecodeGroup, DecodePlan

ROOM = 64
"""Tokens that requests may grow by before their rows are gathered again."""
STEPS_BEFORE = 4
"""Steps in succession before a batch is held: filling the memory takes as long as this many steps then save."""
ALIGNMENT = 64


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
        self.mask = group.mask
        self._mask: Tensor | None = None
        if group.mask is not None:
            self._mask = group.mask.new_full((self.members, 1, 1, self.capacity), float("-inf"))
            self._mask[..., : self.length] = group.mask

    def grow(self) -> None:
        self.length += 1
        self._newest += 1
        if self._mask is not None:
            self._mask[self._member, 0, 0, self._newest] = 0.0
            self.mask = self._mask[..., : self.length]

    def sources(self, heads: int) -> Tensor:
        """What [members, heads, capacity] is filled from, as rows of a cache [slots * heads, d].

        Room that nothing is in yet repeats a member's first row: attention hides it, but NaN would show.
        """
        rows = self.rows.view(self.members, self.length).long()
        rows = torch.cat([rows, rows[:, :1].expand(-1, self.capacity - self.length)], dim=1)
        return (rows[:, None] * heads + torch.arange(heads)[:, None]).flatten()

    def newest(self, heads: int) -> Tensor:
        """Where the members' newest rows are in [members, heads, capacity]; shape [members, heads]."""
        line = torch.arange(self.members * heads).view(-1, heads) * self.capacity
        return line + self._newest[:, None]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's rows: [2 * rows, d], K before V, and in each the groups; and the same as a group's K and V.

    Attributes:
        groups: of each group K and V, [members, heads, capacity, d].
    """

    rows: Tensor
    groups: tuple[tuple[Tensor, Tensor], ...]


@dataclass(slots=True)
class _Batch:
    """The batch that is held."""

    plan: DecodePlan
    groups: tuple[_Group, ...]
    layers: dict[int, _Layer] = field(default_factory=dict)
    sources: dict[int, Tensor] = field(default_factory=dict)
    newest: dict[int, Tensor] = field(default_factory=dict)
    """Both by number of heads: rows of the cache to fill from, and where each request's new K and V go."""
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
        self._steps = 0
        self._batch: _Batch | None = None

    def forget(self) -> None:
        """Something other than a decode step ran."""
        self._lines, self._lengths, self._steps, self._batch = [], [], 0, None

    def follow(self, lines: list[int], lengths: list[int]) -> None:
        """A decode step begins, for requests `lines` of these lengths (the new token included)."""
        steady = lines == self._lines and lengths == [length + 1 for length in self._lengths]
        self._steps = self._steps + 1 if steady else 1
        self._lines, self._lengths = lines, lengths
        batch = self._batch
        if batch is None:
            return
        if not steady or any(group.length == group.capacity for group in batch.groups):
            self._batch = None
            return
        batch.fresh = False
        for newest in batch.newest.values():
            newest += 1
        for group in batch.groups:
            group.grow()

    def layer(
        self,
        layer: int,
        new: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        plan: Callable[[], DecodePlan],
    ) -> Reads | None:
        """A layer's rows, the new ones included; None when they are not held and must be gathered.

        Args:
            new: K and V of one new token for each request, [requests, heads, d].
            cache: the layer's K and V, [slots, heads, d], the new ones already in it.
            plan: of this step, without a window.
        """
        if self._steps < STEPS_BEFORE:
            return None
        if self._batch is None:
            self._batch = self._begin(plan())
        batch, heads = self._batch, cache[0].shape[1]
        if layer in batch.layers:
            held = batch.layers[layer].rows
            held.index_copy_(0, batch.newest[heads], torch.cat(new).view(-1, held.shape[1]))
        elif not (batch.fresh and self._fill(batch, layer, *cache)):
            return None
        return Reads(_reads(batch, layer), batch.plan)

    def _begin(self, plan: DecodePlan) -> _Batch:
        self._taken = 0
        order = plan.order.tolist() if plan.order is not None else range(len(self._lengths))
        lengths = [self._lengths[at] for at in order]
        return _Batch(plan, tuple(_Group(group, lengths[group.begin : group.end]) for group in plan.groups))

    def _fill(self, batch: _Batch, layer: int, keys: Tensor, values: Tensor) -> bool:
        heads, size = keys.shape[1:]
        rows = heads * sum(group.members * group.capacity for group in batch.groups)
        memory = self._take(2 * rows * size, keys.dtype)
        if memory is None:
            return False
        if heads not in batch.sources:
            batch.sources[heads] = torch.cat([group.sources(heads) for group in batch.groups])
            batch.newest[heads] = self._newest(batch, heads)
        held = memory.view(2, rows, size)
        for cache, part in zip((keys, values), held, strict=True):
            torch.index_select(cache.view(-1, size), 0, batch.sources[heads], out=part)
        groups, begin = [], 0
        for group in batch.groups:
            end = begin + group.members * heads * group.capacity
            k, v = held[:, begin:end].view(2, group.members, heads, group.capacity, size)
            groups.append((k, v))
            begin = end
        batch.layers[layer] = _Layer(held.view(-1, size), tuple(groups))
        return True

    @staticmethod
    def _newest(batch: _Batch, heads: int) -> Tensor:
        """[2 * requests * heads]: of K and then of V, in the order of the batch, not of the plan."""
        parts, begin = [], 0
        for group in batch.groups:
            parts.append(begin + group.newest(heads))
            begin += group.members * heads * group.capacity
        newest = torch.cat(parts)
        if batch.plan.inverse is not None:
            newest = newest[batch.plan.inverse]
        return torch.cat((newest.flatten(), begin + newest.flatten()))

    def _take(self, numbers: int, dtype: torch.dtype) -> Tensor | None:
        """Memory that is this batch's until it ends; pages are touched, and then kept, as they are needed."""
        begin, end = self._taken, self._taken + numbers * dtype.itemsize
        if end > self._budget:
            return None
        if self._memory is None:
            self._memory = torch.empty(self._budget, dtype=torch.uint8)
        self._taken = -(-end // ALIGNMENT) * ALIGNMENT
        return self._memory[begin:end].view(dtype)


def _reads(batch: _Batch, layer: int) -> Iterator[Read]:
    for group, (k, v) in zip(batch.groups, batch.layers[layer].groups, strict=True):
        length = group.length
        yield Read(group.begin, group.end, k.narrow(2, 0, length), v.narrow(2, 0, length), group.mask)
