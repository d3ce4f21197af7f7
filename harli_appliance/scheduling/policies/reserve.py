"""Slack that is kept for prompts that may arrive: while their chunks are processed, running requests wait."""

from __future__ import annotations

from collections import deque

from harli_appliance.scheduling.types import Costs, Step

CHUNKS = 2
"""Prefill steps that the reserve holds. One is too few: a second often comes before the first is made up for."""
RECENT = 16
"""Prefill steps whose slowest is what the next one may take."""
UNKNOWN_SHARE = 0.5
"""Of the promised time per token, taken for a prefill step while none could be predicted yet."""


class Reserve:
    """Remembers what recent prefill steps were predicted to take (bounds, alone on the device)."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._slowest = 0.0

    def see(self, step: Step, costs: Costs) -> None:
        """Note a step that is about to run; decode steps and unknown ones tell nothing."""
        if step.kind != "prefill":
            return
        bound = costs.solo(step)
        if bound is not None:
            self._recent.append(bound.upper_ms)
            self._slowest = max(self._recent)

    def ms(self, tpot_ms: float) -> float:
        """Slack to keep: the slowest recent prefill step, or a share of `tpot_ms` where none is known, so often
        as `CHUNKS` says."""
        return CHUNKS * (self._slowest if self._recent else UNKNOWN_SHARE * tpot_ms)
