"""The share of the promised pace that is left unused, so that as few requests miss it as shall.

Adaptive conformal inference (Gibbs and Candes 2021, arXiv 2106.00170) applied to requests: every request that
misses raises the margin, every other lowers it a little, and in the long run the share that misses is the
target.
"""

from __future__ import annotations

START = 0.05
MOST = 0.5
RATE = 0.1
"""One miss raises the margin by this."""
MISSES = 0.005
"""Share of requests that may miss: half of what an attainment of 99% leaves, the rest is for chance."""


class Margin:
    """
    Attributes:
        value: the margin, in [0, `MOST`].
    """

    def __init__(self) -> None:
        self.value = START
        self._ended = 0
        self._missed = 0

    def see(self, ended: int, missed: int) -> None:
        """
        Args:
            ended, missed: requests so far; neither ever falls.
        """
        new, bad = ended - self._ended, missed - self._missed
        if new:
            self._ended, self._missed = ended, missed
            self.value = min(MOST, max(0.0, self.value + RATE * (bad - MISSES * new)))
