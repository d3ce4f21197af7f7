"""How fast training goes at each place that it can run: beside serving on a split, or on the whole device.

A token's work is counted in thirds as it is done, forward one and backward two (2 and 4 of 6 FLOPs a parameter); a
loss unit takes time and counts for nothing. So a place is judged only by as much work as a whole micro-batch, in
which forward, loss and backward have their true shares. Knows numbers and places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harli_appliance.scheduling.types import Split

FORWARD, BACKWARD = 1 / 3, 2 / 3
"""Shares of a token's work."""

Told = Callable[[float, float, Split | None], None]
"""Gets tokens, the seconds that they took, and the place."""


@dataclass(slots=True)
class _Done:
    tokens: float = 0.0
    seconds: float = 0.0


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
