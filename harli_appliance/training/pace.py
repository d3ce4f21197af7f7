"""How fast training goes at each place that it can run: beside serving on a split, or on the whole device.

A token's work is counted in thirds as it is done, forward one and backward two (2 and 4 of 6 FLOPs a parameter); a
loss unit takes time and counts for nothing. So a place is judged only by as much work as a whole micro-batch, in
which forward, loss and backward have their true shares. Knows numbers and places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from harli_appliance.scheduling.types import Split

FORWARD, BACKWARD = 1 / 3, 2 / 3
"""Shares of a token's work."""
UNIT_WEIGHT = 0.1
"""Of the newest unit in the average of its kind."""

Told = Callable[[float, float, Split | None], None]
"""Gets tokens, the seconds that they took, and the place."""


@dataclass(slots=True)
class _Done:
    tokens: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class UnitTimes:
    """What units of one kind took, in milliseconds of the whole device: on a share of it, that share counts."""

    count: int = 0
    total_ms: float = 0.0
    recent_ms: float = math.nan

    def add(self, took_ms: float) -> None:
        self.count += 1
        self.total_ms += took_ms
        before = took_ms if math.isnan(self.recent_ms) else self.recent_ms
        self.recent_ms = before + UNIT_WEIGHT * (took_ms - before)


class Pace:
    """Adds up units until there is something to tell."""

    def __init__(self, tell: Told) -> None:
        self._tell = tell
        self._done: dict[Split | None, _Done] = {}

    def ran(self, tokens: float, seconds: float, place: Split | None) -> None:
        """A unit has run; `tokens` are whole tokens' work."""
        done = self._done.setdefault(place, _Done())
        done.tokens += tokens
        done.seconds += seconds

    def ended(self, tokens: int) -> None:
        """A micro-batch of so many tokens is complete: tell of every place that did as much since it last was."""
        for place in [place for place, done in self._done.items() if done.tokens >= tokens * (1 - 1e-6)]:
            done = self._done.pop(place)
            self._tell(done.tokens, done.seconds, place)
