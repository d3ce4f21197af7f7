"""SGLang's KV cache as slots that can be taken out of its hands and given back.

One slot is the K and V rows of one token over all layers. Taking a slot removes it from SGLang's free list, so
SGLang admits and retracts requests as if its cache were that much smaller; SGLang's own leak check is told.
All methods run on the thread of the inference lane, between steps. Does not know why slots are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from torch import Tensor

from harli_appliance.memory.pool import SlotCounts
from harli_appliance.runtime.sglang_runtime import SglangRuntime

ADMISSION_CLIP = 4096
"""SGLang reserves at most this many answer tokens for a request (``SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION``)."""
ADMISSION_MARGIN = 8
"""Slots beyond prompt and answer that SGLang wants to see free before it admits a request."""
HORIZON = 512
"""Tokens that running answers may grow by while no request waits; leases come back within one work unit."""


class SglangSlots:
    """The slots of a runtime's KV cache; implements `harli_appliance.memory.pool.SlotSource`."""

    def __init__(self, runtime: SglangRuntime) -> None:
        self._scheduler: Any = runtime.scheduler
        self._allocator: Any = self._scheduler.token_to_kv_pool_allocator
        cache = self._allocator.get_kvcache()
        self._size = int(self._allocator.size)
        self._taken = 0
        # [slots + 1, kv heads, head size] per layer -> [slots + 1, row width]; row 0 is SGLang's dummy.
        self.k_buffers = tuple(buffer.flatten(1) for buffer in cache.k_buffer)
        self.v_buffers = tuple(buffer.flatten(1) for buffer in cache.v_buffer)

    @property
    def size(self) -> int:
        return self._size

    def counts(self) -> SlotCounts:
        free = int(self._allocator.available_size())
        cached = int(self._scheduler.tree_cache.evictable_size())
        return SlotCounts(free=free, cached=cached, serving=self._size - self._taken - free - cached)

    def demand(self) -> int:
        """Slots that requests may ask for before leases could be taken back.

        With requests waiting, all that SGLang's admission reckons with (it counts at most `ADMISSION_CLIP`
        tokens of an answer); otherwise what running ones may grow by within `HORIZON` tokens. It assumes the
        worst: answers as long as they may become, and prompts of which the prefix cache holds nothing (a cached
        prefix would be held against the cache instead, which comes to the same). A long prompt counts for what is
        not computed yet.
        """
        scheduler = self._scheduler
        chunked = scheduler.chunked_req
        waiting = [
            *scheduler.waiting_queue,
            *scheduler.grammar_manager.grammar_queue,
            *([chunked] if chunked is not None else []),
        ]
        clip = ADMISSION_CLIP if waiting else HORIZON
        running = {id(request): request for request in scheduler.running_batch.reqs}
        if scheduler.last_batch is not None:  # a prefill batch joins the running one at the next plan
            running |= {id(request): request for request in scheduler.last_batch.reqs}
        if chunked is not None:  # part of the last batch, but nowhere near its answer
            running.pop(id(chunked), None)
        slots = sum(_answer_left(request, clip) for request in running.values() if not request.finished())
        slots += sum(
            # A request that was taken back after some tokens computes those again too.
            len(request.origin_input_ids)
            + len(request.output_ids)
            - request.kv.kv_allocated_len
            + _answer_left(request, clip)
            + ADMISSION_MARGIN
            for request in waiting
        )
        return int(slots)

    def take(self, count: int, *, evict: int) -> Tensor | None:
        """Take `count` free slots, int64 indices of shape [count]; None when there are not that many.

        Args:
            evict: unused prefix-cache entries, in slots, that may be dropped. An entry is dropped whole.
        """
        missing = count - int(self._allocator.available_size())
        if missing > evict:
            return None
        if missing > 0:
            self._evict(missing)
        indices: Tensor | None = self._allocator.alloc(count)
        if indices is not None:
            self._account(count)
        return indices

    def take_contiguous(self, count: int, *, evict: int) -> Tensor | None:
        """Take `count` free slots with consecutive indices, ascending; None when no run is that long.

        Runs are taken from the top, and SGLang is left with its lowest slots first, so that what is served
        gathers at the bottom. While no run is long enough, prefix-cache entries are dropped, the least recently
        used first, as many as are asked for at a time.
        """
        allocator = self._allocator
        before = int(allocator.available_size())
        missing = count - before
        if missing > evict:
            return None
        if missing > 0:
            self._evict(missing)
        while True:
            run, rest = _top_run(_all_free(allocator), count)
            allocator.free_pages, allocator.release_pages = rest, rest[:0]
            if run is not None:
                self._account(count)
                return run
            left = min(evict - (int(allocator.available_size()) - before), count)
            if left <= 0 or not self._evict(left):
                return None

    def _evict(self, slots: int) -> bool:
        """Drop unused cache entries of at least `slots` slots, or all; whether any was there."""
        before = int(self._allocator.available_size())
        self._allocator.free_group_begin()  # else each entry would copy the whole free list
        try:
            self._scheduler.tree_cache.evict(EvictParams(num_tokens=slots))
        finally:
            self._allocator.free_group_end()
        return int(self._allocator.available_size()) > before

    def give(self, indices: Tensor) -> None:
        self._allocator.free(indices)
        self._account(-len(indices))
        # SGLang does not look at its queue again while this flag stands.
        self._scheduler.running_batch.batch_is_full = False

    def _account(self, taken: int) -> None:
        """Tell SGLang's leak check how many slots it owns now."""
        self._taken += taken
        owned = self._size - self._taken
        for checker in (self._scheduler.invariant_checker, self._scheduler.pool_stats_observer):
            object.__setattr__(checker, "max_total_num_tokens", owned)


def _answer_left(request: Any, clip: int) -> int:
    left: int = request.sampling_params.max_new_tokens - len(request.output_ids)
    return max(0, min(left, clip))


def _all_free(allocator: Any) -> Tensor:
    if len(allocator.release_pages) == 0:
        return allocator.free_pages  # type: ignore[no-any-return]
    return torch.cat([allocator.free_pages, allocator.release_pages])


def _top_run(free: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
    """The highest `count` consecutive indices among `free` (None without such a run), and the others, ascending.

    A bitmap instead of a sort: linear in the size of the pool, some 50 us for 16,384 slots.
    """
    indices = free.cpu().numpy()
    bitmap = np.zeros(int(indices.max(initial=0)) + 1, dtype=np.bool_)
    bitmap[indices] = True
    ordered = np.flatnonzero(bitmap)
    if len(ordered) < count:
        return None, torch.from_numpy(ordered).to(free)
    starts = np.flatnonzero(ordered[count - 1 :] - ordered[: len(ordered) - count + 1] == count - 1)
    if not len(starts):
        return None, torch.from_numpy(ordered).to(free)
    at = int(starts[-1])
    rest = np.concatenate([ordered[:at], ordered[at + count :]])
    return torch.from_numpy(ordered[at : at + count]).to(free), torch.from_numpy(rest).to(free)
