"""How long requests that are being answered wait at a stretch, while prompts are processed one after the other."""

from __future__ import annotations

import bisect
import math
from collections import deque

from harli_appliance.scheduling.types import Bound, Step

RECENT = 128
"""Stretches that are remembered."""
UNKNOWN_SHARE = 0.5
"""Of the promised time per token, taken for a stretch while none was seen."""


class Stalls:
    """Remembers stretches of prefill steps, as they were predicted to take alone on the device."""

    def __init__(self) -> None:
        self._stretch_ms = 0.0
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def see(self, step: Step, solo: Bound) -> None:
        """Note a step that is about to run; a decode step ends a stretch."""
        if step.kind == "prefill":
            self._stretch_ms += solo.expected_ms
        elif self._stretch_ms > 0.0:
            self._recent.append(self._stretch_ms)
            bisect.insort(self._sorted, self._stretch_ms)
            self._stretch_ms = 0.0
            if len(self._recent) > RECENT:
                del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]

    def next_ms(self, share: float, tpot_ms: float) -> float:
        """What the next stretch does not exceed with probability `share`, in [0, 1], of the recent ones."""
        if not self._sorted:
            return UNKNOWN_SHARE * tpot_ms
        return self._sorted[min(len(self._sorted) - 1, math.ceil(share * len(self._sorted)))]
