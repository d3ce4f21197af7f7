"""How long answers get, as those tell that ended: what can be counted on of an answer that is under way."""

from __future__ import annotations

import bisect
from collections import deque

RECENT = 256
"""Answers that are remembered."""
SHARE = 0.05
"""Of the answers that get as far as one has, those that may end sooner than is counted on."""


class AnswerLengths:
    """Remembers lengths in tokens."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, tokens: int) -> None:
        self._recent.append(tokens)
        bisect.insort(self._sorted, tokens)
        if len(self._recent) > RECENT:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]

    def left(self, tokens: int) -> int:
        """Tokens still to come of an answer that has `tokens`, in all but `SHARE` of such cases; 0 of one that is
        longer than any remembered."""
        longer = bisect.bisect_right(self._sorted, tokens)
        count = len(self._sorted) - longer
        return self._sorted[longer + int(SHARE * count)] - tokens if count else 0
