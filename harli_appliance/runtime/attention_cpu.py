"""Attention for CPUs over the whole batch at once, in the place of SGLang's ``torch_native``.

SGLang's own loops over the requests in Python, in every layer. Here what depends on the batch alone (which cache
rows, which mask) is prepared once a step; a layer then gathers K and V of many requests at once and makes one call
of scaled dot product attention, with the query heads of a KV head as rows of one query, so that no head is copied.

It is registered in SGLang's registry under the name that SGLang knows for a backend without kernels of its own:
everything else that SGLang decides by that name (no Triton, no graphs) holds here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "torch_native"

PADDED_TO_REAL = 1.5
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, cap: float, causal: bool = False
) -> Tensor:
    """Attention of q [a, b, n, d] to k, v [a, b, keys, d]; logits x become cap * tanh(x / cap) where cap > 0."""
    if cap <= 0.0:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    logits = torch.matmul(q, k.transpose(-1, -2)).mul_(scale / cap).tanh_().mul_(cap)
    if mask is not None:
        logits += mask
    return torch.matmul(torch.softmax(logits, dim=-1), v)


class Workspace:
    """Memory for gathered rows, kept between calls: fresh pages cost more than the gathering itself."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def gather(self, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of k and v [slots, heads, d], as [rows, heads, d]; valid until the next call."""
        shape = (len(rows), *k.shape[1:])
        count = rows.numel() * k[0].numel()
        if self._numbers.dtype != k.dtype or len(self._numbers) < 2 * count:
            self._numbers = torch.empty(3 * count, dtype=k.dtype)  # half as much again, for longer batches
        out_k, out_v = self._numbers[:count].view(shape), self._numbers[count : 2 * count].view(shape)
        for source, out in ((k, out_k), (v, out_v)):
            torch.index_select(source.flatten(1), 0, rows, out=out.flatten(1))
        return out_k, out_v


class CpuAttentionBackend(TorchNativeAttnBackend):  # type: ignore[misc]  # SGLang is untyped here
    """Decoder self-attention, with sliding windows and capped logits; the rest is inherited."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._workspace = Workspace()
        self._decode: dict[int, DecodePlan] = {}
        self._extend: dict[tuple[int, bool], tuple[ExtendRequest, ...]] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        # Plans are made by the first layer of each kind, which knows its window, and serve the others.
        self._decode.clear()
        self._extend.clear()

    def _inherits(self, q: Tensor, k: Tensor | None, layer: Any) -> bool:
        """Whether a layer is one of those that are left to SGLang's own implementation."""
        return (
            k is None  # it reads the cache of another layer
            or layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
            or layer.qk_head_dim != layer.v_head_dim
            or self.use_sliding_window_kv_pool
            or self.token_to_kv_pool.get_key_buffer(layer.layer_id).dtype != q.dtype
        )

    def _cache(
        self, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *, save: bool
    ) -> tuple[Tensor, Tensor]:
        """The layer's K and V cache, [slots, kv heads, d] each, with the new rows in it."""
        pool = self.token_to_kv_pool
        if save:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """One new token for each request; q [batch, heads * d], returned in the same shape."""
        if self._inherits(q, k, layer):
            inherited: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            return inherited
        keys, values = self._cache(k, v, layer, forward_batch, save=save_kv_cache)
        plan = self._decode_plan(layer.sliding_window_size, keys, forward_batch)
        heads, size = layer.tp_k_head_num, layer.qk_head_dim
        q = q.reshape(-1, heads, layer.tp_q_head_num // heads, size)
        if plan.order is not None:
            q = q[plan.order]
        parts = []
        for group in plan.groups:
            wanted = (group.end - group.begin, group.length, heads, size)
            gathered = self._workspace.gather(keys, values, group.rows)
            group_k, group_v = (part.view(wanted).transpose(1, 2) for part in gathered)
            part = q[group.begin : group.end]
            out = attend(part, group_k, group_v, group.mask, scale=layer.scaling, cap=layer.logit_cap)
            parts.append(out.reshape(len(part), -1))
        return parts[0] if plan.inverse is None else torch.cat(parts)[plan.inverse]

    def _decode_plan(self, window: int, keys: Tensor, forward_batch: Any) -> DecodePlan:
        plan = self._decode.get(window)
        if plan is None:
            plan = self._decode[window] = plan_decode(
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens.tolist(),
                window=window,
                width=keys[0].numel(),
                dtype=keys.dtype,
            )
        return plan

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """New tokens of prompts; q [tokens, heads * d], returned in the same shape."""
        if self._inherits(q, k, layer):
            inherited: Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            return inherited
        keys, values = self._cache(k, v, layer, forward_batch, save=save_kv_cache)
        heads, size = layer.tp_k_head_num, layer.qk_head_dim
        grouped = q.view(-1, heads, layer.tp_q_head_num // heads, size)
        out = q.new_empty(q.shape)
        grouped_out = out.view(grouped.shape)
        for request in self._extend_plan(layer, q.dtype, forward_batch):
            here = slice(request.begin, request.end)
            if request.rows is None:
                request_k, request_v = k.view(-1, heads, size)[here], v.view(-1, heads, size)[here]
            else:
                request_k, request_v = self._workspace.gather(keys, values, request.rows)
            # [tokens, kv heads, query heads of each, d] -> kv heads as the batch; K and V are shared by stride 0.
            part = grouped[here].permute(1, 2, 0, 3)
            request_k, request_v = (
                rows.transpose(0, 1)[:, None].expand(-1, part.shape[1], -1, -1)
                for rows in (request_k, request_v)
            )
            attended = attend(
                part,
                request_k,
                request_v,
                request.mask,
                scale=layer.scaling,
                cap=layer.logit_cap,
                causal=request.mask is None,
            )
            grouped_out[here] = attended.permute(2, 0, 1, 3)
        return out

    def _extend_plan(self, layer: Any, dtype: torch.dtype, forward_batch: Any) -> tuple[ExtendRequest, ...]:
        key = (layer.sliding_window_size, layer.logit_cap > 0.0)
        plan = self._extend.get(key)
        if plan is None:
            window, masked = key
            plan = self._extend[key] = plan_extend(
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices.tolist(),
                forward_batch.extend_prefix_lens.tolist(),
                forward_batch.extend_seq_lens.tolist(),
                window=window,
                masked=masked,
                dtype=dtype,
            )
        return plan


@register_attention_backend(NAME)  # type: ignore[untyped-decorator]
def _backend(runner: Any) -> CpuAttentionBackend:
    return CpuAttentionBackend(runner)
