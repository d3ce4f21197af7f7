"""Attention for CPUs over the whole batch at once, in the place of SGLang's ``torch_native``.

SGLang's own loops over the requests in Python, in every layer. Here what depends on the batch alone (which cache
rows, which mask) is prepared once a step; a layer then gathers K and V of many requests at once and makes one call
of scaled dot product attention, with the query heads of a KV head as rows of one query, so that no head is copied.
While a batch decodes on unchanged, what was gathered stays, and a step adds one row to each request.

It is registered in SGLang's registry under the name that SGLang knows for a backend without kernels of its own:
everything else that SGLang decides by that name (no Triton, no graphs) holds here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from harli_appliance.runtime.attention_plan import DecodePlan, ExtendRequest, plan_decode, plan_extend
from harli_appliance.runtime.attention_resident import Read, Reads, ResidentKV

NAME = "torch_native"
RESIDENT_SHARE, RESIDENT_LEAST = 0.5, 2**26
"""Rows that stay gathered from step to step may take this share of the cache's size, beside it, or these bytes."""


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


def _gathered(plan: DecodePlan, gather: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Reads:
    def parts() -> Iterator[Read]:  # one at a time: they share the workspace
        for group in plan.groups:
            k, v = (
                rows.view(group.end - group.begin, group.length, *rows.shape[1:]).transpose(1, 2)
                for rows in gather(group.rows)
            )
            yield Read(group.begin, group.end, k, v, group.mask)

    return Reads(parts(), plan)


class CpuAttentionBackend(TorchNativeAttnBackend):  # type: ignore[misc]  # SGLang is untyped here
    """Decoder self-attention, with sliding windows and capped logits; the rest is inherited."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._workspace = Workspace()
        pool = self.token_to_kv_pool
        self._resident = ResidentKV(max(RESIDENT_LEAST, int(RESIDENT_SHARE * sum(pool.get_kv_size_bytes()))))
        # What SGLang's pool does for every layer, it does here once: ask how rows are laid out and stored.
        self._plain_rows = (
            type(pool) is MHATokenToKVPool
            and pool.kv_cache_layout == "nhd"
            and not pool.use_hnd
            and not pool.is_quantized_kv_cache
            and pool.store_dtype == pool.dtype
        )
        self._caches: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._lengths: list[int] = []
        self._longest = 0
        self._decode: dict[int, DecodePlan] = {}
        self._extend: dict[tuple[int, bool], tuple[ExtendRequest, ...]] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        # Plans are made by the first layer of each kind, which knows its window, and serve the others.
        self._decode.clear()
        self._extend.clear()
        if forward_batch.forward_mode.is_decode():
            self._lengths = forward_batch.seq_lens.tolist()
            self._longest = max(self._lengths)
            self._resident.follow(forward_batch.req_pool_indices.tolist(), self._lengths)
        else:
            self._resident.forget()

    def _cache(self, q: Tensor, k: Tensor | None, layer: Any) -> tuple[Tensor, Tensor] | None:
        """The layer's K and V cache, [slots, kv heads, d] each; None for what is left to SGLang's own code."""
        if k is None:  # it reads the cache of another layer
            return None
        number = layer.layer_id
        if number not in self._caches:
            self._caches[number] = (
                None if self._inherits(q, layer) else self.token_to_kv_pool.get_kv_buffer(number)
            )
        return self._caches[number]

    def _inherits(self, q: Tensor, layer: Any) -> bool:
        return bool(
            layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
            or layer.qk_head_dim != layer.v_head_dim
            or self.use_sliding_window_kv_pool
            or self.token_to_kv_pool.get_key_buffer(layer.layer_id).dtype != q.dtype
        )

    def _save(self, cache: tuple[Tensor, Tensor], k: Tensor, v: Tensor, layer: Any, rows: Tensor) -> None:
        if not self._plain_rows:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(rows, None), k, v)
            return
        for buffer, new in zip(cache, (k, v), strict=True):
            buffer.index_copy_(0, rows, new)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """One new token for each request; q [batch, heads * d], returned in the same shape."""
        cache = self._cache(q, k, layer)
        if cache is None:
            inherited: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            return inherited
        if save_kv_cache:
            self._save(cache, k, v, layer, forward_batch.out_cache_loc)
        keys, values = cache
        heads, size = layer.tp_k_head_num, layer.qk_head_dim
        window = layer.sliding_window_size
        if window + 1 >= self._longest:
            window = -1  # it hides nothing yet

        def plan() -> DecodePlan:
            return self._decode_plan(window, keys, forward_batch)

        def gather(rows: Tensor) -> tuple[Tensor, Tensor]:
            return self._workspace.gather(keys, values, rows)

        held = self._resident.layer(layer.layer_id, (k, v), (keys, values), plan) if window < 0 else None
        reads = held if held is not None else _gathered(plan(), gather)
        order, inverse = reads.plan.order, reads.plan.inverse
        if order is not None:
            q = q.index_select(0, order)
        q = q.reshape(-1, heads, layer.tp_q_head_num // heads, size)
        scale, cap = layer.scaling, layer.logit_cap or 0.0
        parts = [
            attend(q[read.begin : read.end], read.k, read.v, read.mask, scale=scale, cap=cap)
            for read in reads.parts
        ]
        out = parts[0] if inverse is None else torch.cat(parts).index_select(0, inverse)
        return out.reshape(len(out), -1)

    def _decode_plan(self, window: int, keys: Tensor, forward_batch: Any) -> DecodePlan:
        plan = self._decode.get(window)
        if plan is None:
            plan = self._decode[window] = plan_decode(
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                self._lengths,
                window=window,
                width=keys[0].numel(),
                dtype=keys.dtype,
            )
        return plan

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """New tokens of prompts; q [tokens, heads * d], returned in the same shape."""
        cache = self._cache(q, k, layer)
        if cache is None:
            inherited: Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            return inherited
        if save_kv_cache:
            self._save(cache, k, v, layer, forward_batch.out_cache_loc)
        keys, values = cache
        heads, size = layer.tp_k_head_num, layer.qk_head_dim
        grouped = q.reshape(-1, heads, layer.tp_q_head_num // heads, size)
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
                cap=layer.logit_cap or 0.0,
                causal=request.mask is None,
            )
            grouped_out[here] = attended.permute(2, 0, 1, 3)
        return out

    def _extend_plan(self, layer: Any, dtype: torch.dtype, forward_batch: Any) -> tuple[ExtendRequest, ...]:
        key = (layer.sliding_window_size, (layer.logit_cap or 0.0) > 0.0)
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
