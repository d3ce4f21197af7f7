"""The earliest of many deadlines, also when a step puts all of them off at once.

A decode step moves the deadline of every running request by the same time, so their order stays: a heap keeps what
each deadline is apart from the steps that were common to all. Knows names and seconds.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush


class Deadlines:
    """Args: interval_s: by how much `put_off` moves every deadline."""

    def __init__(self, interval_s: float) -> None:
        self._interval = interval_s
        self._moves = 0
        self._keys: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def set(self, name: str, due: float) -> None:
        """Add `name`, or change when it is due."""
        key = due - self._moves * self._interval
        self._keys[name] = key
        heappush(self._heap, (key, name))
        if len(self._heap) > 64 + 4 * len(self._keys):  # entries of what changed pile up at the bottom
            self._heap = [(key, name) for name, key in self._keys.items()]
            heapify(self._heap)

    def discard(self, name: str) -> None:
        self._keys.pop(name, None)

    def put_off(self) -> None:
        """Every deadline is one interval later."""
        self._moves += 1

    def earliest(self) -> float:
        """Infinity when there is none."""
        while self._heap:
            key, name = self._heap[0]
            if self._keys.get(name) == key:
                return key + self._moves * self._interval
            heappop(self._heap)
        return math.inf
