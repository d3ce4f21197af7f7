"""The share of the promised pace that is left unused, so that as few requests miss it as shall.

Adaptive conformal inference (Gibbs and Candes 2021, arXiv 2106.00170) applied to requests: every request that
misses raises the margin, every other lowers it a little, and in the long run the share that misses is the
target. It starts wide, because the first requests count as much as the later ones.
"""

from __future__ import annotations

START = 0.3
MOST = 0.5
RATE = 0.1
"""One miss raises the margin by this."""
MISSES = 0.005
"""Share of requests that may miss: half of what an attainment of 99% leaves, the rest is for chance."""


class Margin:
    def __init__(self) -> None:
        self._value = START
        self._ended = 0
        self._missed = 0

    def after(self, ended: int, missed: int) -> float:
        """The margin, in [0, `MOST`].

        Args:
            ended, missed: requests so far; neither ever falls.
        """
        new, bad = ended - self._ended, missed - self._missed
        if new:
            self._ended, self._missed = ended, missed
            self._value = min(MOST, max(0.0, self._value + RATE * (bad - MISSES * new)))
        return self._value
