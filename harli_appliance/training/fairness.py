"""Whose turn it is to train: shares of device time by weight, or first come, first served.

A turn is a micro-batch: as long as it takes, which is known only afterwards. Knows names, weights and
milliseconds; knows no clock, no memory and no jobs.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Protocol

from harli_appliance.schema import JobOrder

QUANTUM_MS = 50.0
"""Device time that a weight of 1 is given a round. Smaller than a turn, so that turns alternate."""

RECENT_MS = 120_000.0
"""Device time over which `RecentShares` forgets two thirds."""


class Order(Protocol):
    """Chooses among those that joined. Names are unique; weights are above zero."""

    def join(self, name: str, weight: float) -> None: ...
    def reweigh(self, name: str, weight: float) -> None: ...
    def leave(self, name: str) -> None: ...
    def next(self, ready: Collection[str]) -> str | None:
        """Whose turn it is among `ready`; None when nobody is."""
        ...

    def charge(self, name: str, spent_ms: float) -> None:
        """Account for a turn, also one that came to nothing: its time is gone for the others too."""
        ...


def make_order(name: JobOrder) -> Order:
    return DeficitRoundRobin() if name == "fair" else FirstCome()


class DeficitRoundRobin:
    """Deficit round robin (Shreedhar and Varghese, 1996), charged after the turn: only then its cost is known.

    A round gives everyone that is ready `quantum_ms` times its weight; whoever has something left may take a turn
    and may overdraw by its length. So two that are always ready differ in device time over weight by at most
    `quantum_ms` plus the longest turn over the smaller weight. Who is not ready is given nothing: having
    waited for memory is no reason to hold up the others later. Debts stay.
    """

    def __init__(self, quantum_ms: float = QUANTUM_MS) -> None:
        self._quantum_ms = quantum_ms
        self._weights: dict[str, float] = {}
        self._left: dict[str, float] = {}  # in the order of a round

    def join(self, name: str, weight: float) -> None:
        self._weights[name] = weight
        self._left[name] = 0.0

    def reweigh(self, name: str, weight: float) -> None:
        self._weights[name] = weight

    def leave(self, name: str) -> None:
        del self._weights[name], self._left[name]

    def next(self, ready: Collection[str]) -> str | None:
        waiting = [name for name in self._left if name in ready]
        if not waiting:
            return None
        if all(self._left[name] <= 0.0 for name in waiting):
            self._give_rounds(waiting)
        return next(name for name in waiting if self._left[name] > 0.0)

    def _give_rounds(self, waiting: list[str]) -> None:
        """As many rounds at once as it takes until somebody may go."""
        rounds = min(
            math.floor(-self._left[name] / (self._quantum_ms * self._weights[name])) + 1 for name in waiting
        )
        for name in waiting:
            self._left[name] += rounds * self._quantum_ms * self._weights[name]

    def charge(self, name: str, spent_ms: float) -> None:
        self._left[name] -= spent_ms


class FirstCome:
    """The heaviest first, among equals the first that joined; the others get what it cannot use."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}

    def join(self, name: str, weight: float) -> None:
        self._weights[name] = weight

    def reweigh(self, name: str, weight: float) -> None:
        self._weights[name] = weight

    def leave(self, name: str) -> None:
        del self._weights[name]

    def next(self, ready: Collection[str]) -> str | None:
        waiting = [name for name in self._weights if name in ready]
        return max(waiting, key=lambda name: self._weights[name], default=None)

    def charge(self, name: str, spent_ms: float) -> None:
        """Nothing depends on it."""


class RecentShares:
    """Who had which share of the device time lately, for people to see."""

    def __init__(self) -> None:
        self._recent: dict[str, float] = {}

    def add(self, name: str, spent_ms: float) -> None:
        kept = math.exp(-spent_ms / RECENT_MS)
        self._recent = {other: spent * kept for other, spent in self._recent.items()}
        self._recent[name] = self._recent.get(name, 0.0) + spent_ms

    def forget(self, name: str) -> None:
        self._recent.pop(name, None)

    def of(self, name: str) -> float:
        """In [0, 1]."""
        whole = sum(self._recent.values())
        return self._recent.get(name, 0.0) / whole if whole else 0.0
