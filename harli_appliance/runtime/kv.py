"""SGLang's KV cache as slots that can be taken out of its hands and given back.

One slot is the K and V rows of one token over all layers. Taking a slot removes it from SGLang's free list, so
SGLang admits and retracts requests as if its cache were that much smaller; SGLang's own leak check is told.
All methods run on the thread of the inference lane, between steps. Does not know why slots are taken.
"""

from __future__ import annotations

from typing import Any

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
        tokens of an answer); otherwise what running ones may grow by within `HORIZON` tokens.
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
        slots = sum(
            min(request.sampling_params.max_new_tokens - len(request.output_ids), clip)
            for request in running.values()
            if not request.finished()
        )
        slots += sum(
            len(request.origin_input_ids)
            + min(request.sampling_params.max_new_tokens, clip)
            + ADMISSION_MARGIN
            for request in waiting
        )
        return int(slots)

    def take(self, count: int, *, evict: bool) -> Tensor | None:
        """Take `count` free slots, int64 indices of shape [count]; None when there are not that many.

        Args:
            evict: whether unused prefix-cache entries may be dropped to free slots.
        """
        missing = count - int(self._allocator.available_size())
        if missing > 0 and evict:
            self._scheduler.tree_cache.evict(EvictParams(num_tokens=missing))
        indices: Tensor | None = self._allocator.alloc(count)
        if indices is not None:
            self._account(count)
        return indices

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
