"""SGLang's slot allocator, radix cache and admission in plain Python, for testing the pool over many sequences.

As SGLang does it: a free list taken from the front, cached entries that are dropped whole and the least recently
used first, requests that are admitted when prompt and answer fit what is free or cached, one slot a token after.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from harli_appliance.memory.pool import SlotCounts

MARGIN = 1


@dataclass
class Request:
    prompt: int
    answer: int
    slots: list[int] = field(default_factory=list)
    cached: list[int] | None = None
    """The entry of the prefix cache that the request began with; locked while it runs."""

    @property
    def length(self) -> int:
        return len(self.slots) + len(self.cached or ())

    @property
    def left(self) -> int:
        return self.prompt + self.answer - self.length


class RadixSlots:
    """A slot source with requests that use it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = list(range(size))
        self.cache: list[list[int]] = []
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    # -- what the pool asks --------------------------------------------------------------------------------

    def counts(self) -> SlotCounts:
        held = sum(request.length for request in self.running)
        return SlotCounts(len(self.free), sum(map(len, self.cache)), held)

    def demand(self) -> int:
        return sum(r.left for r in self.running) + sum(r.prompt + r.answer + MARGIN for r in self.waiting)

    def take(self, count: int, *, evict: int) -> Tensor | None:
        missing = count - len(self.free)
        if missing > evict:
            return None
        self.evict(missing)
        taken, self.free = self.free[:count], self.free[count:]
        return torch.tensor(taken, dtype=torch.long)

    def take_contiguous(self, count: int, *, evict: int) -> Tensor | None:
        while True:
            self.free.sort()
            for start in range(len(self.free) - count, -1, -1):
                if self.free[start + count - 1] - self.free[start] == count - 1:
                    run = self.free[start : start + count]
                    del self.free[start : start + count]
                    return torch.tensor(run, dtype=torch.long)
            if evict <= 0 or not self.cache:
                return None
            evict -= self.evict(1)

    def give(self, indices: Tensor) -> None:
        self.free += indices.tolist()

    # -- what serving does ---------------------------------------------------------------------------------

    def evict(self, count: int) -> int:
        dropped = 0
        while dropped < count and self.cache:
            entry = self.cache.pop(0)
            self.free += entry
            dropped += len(entry)
        return dropped

    def _alloc(self, request: Request, count: int) -> bool:
        self.evict(count - len(self.free))
        if len(self.free) < count:
            return False
        request.slots += self.free[:count]
        del self.free[:count]
        return True

    def admit(self) -> list[Request]:
        """SGLang's admission: the longest waiting first, none that does not fit with all that run."""
        admitted = []
        while self.waiting:
            request = self.waiting[0]
            room = len(self.free) + sum(map(len, self.cache)) - sum(r.left for r in self.running)
            if request.prompt + request.answer + MARGIN > room:
                break
            self.waiting.pop(0)
            fitting = [entry for entry in self.cache if len(entry) < request.prompt]
            if fitting:
                request.cached = fitting[-1]
                self.cache.remove(request.cached)
            self.running.append(request)
            if not self._alloc(request, request.prompt - len(request.cached or ())):
                raise AssertionError("admitted without room for its prompt")
            admitted.append(request)
        return admitted

    def decode(self) -> bool:
        """One token each; False when one got no slot."""
        return all(self._alloc(request, 1) for request in list(self.running) if request.left)

    def end(self, request: Request, *, cache: bool) -> None:
        self.running.remove(request)
        if request.cached is not None:
            self.cache.append(request.cached)
        if cache and request.slots:
            self.cache.append(request.slots)
        else:
            self.free += request.slots
