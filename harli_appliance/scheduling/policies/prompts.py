"""What a prompt costs the requests that are being answered: while it is read, all of them wait."""

from __future__ import annotations

from collections import deque

from harli_appliance.scheduling.types import Bound

RECENT = 16
"""Prefill steps whose slowest is what the next one may take."""


class Prompts:
    """Remembers prefill steps, as they were predicted to take alone on the device.

    Attributes:
        next_ms: what the next one may take: as much as the slowest recent one; 0 before there was one.
    """

    def __init__(self) -> None:
        self.next_ms = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def see(self, solo: Bound | None) -> None:
        """Note a prefill step that is about to run; one that cannot be predicted tells nothing."""
        if solo is not None:
            self._recent.append(solo.upper_ms)
            self.next_ms = max(self._recent)
