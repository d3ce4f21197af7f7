"""What prompts cost the requests that are being answered: while a prompt is processed, all of them wait."""

from __future__ import annotations

from collections import deque

from harli_appliance.scheduling.types import Bound, Step

RECENT = 16
"""Prefill steps whose slowest is what the next one may take."""
WEIGHT = 0.05
"""Of the newest decode step in the average of what came before it."""
UNKNOWN_SHARE = 0.5
"""Of the promised time per token, taken for a prefill step while none could be predicted yet."""


class Prompts:
    """Remembers prefill steps, as they were predicted to take alone on the device.

    Attributes:
        per_token_ms: time that prefill steps take between two decode steps, on average.
    """

    def __init__(self) -> None:
        self.per_token_ms = 0.0
        self._since_decode_ms = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._slowest = 0.0

    def see(self, step: Step, solo: Bound | None) -> None:
        """Note a step that is about to run; one that cannot be predicted tells nothing."""
        if solo is None:
            return
        if step.kind == "prefill":
            self._since_decode_ms += solo.expected_ms
            self._recent.append(solo.upper_ms)
            self._slowest = max(self._recent)
        else:
            self.per_token_ms += WEIGHT * (self._since_decode_ms - self.per_token_ms)
            self._since_decode_ms = 0.0

    def next_ms(self, tpot_ms: float) -> float:
        """What the next prefill step may take: as much as the slowest recent one."""
        return self._slowest if self._recent else UNKNOWN_SHARE * tpot_ms
