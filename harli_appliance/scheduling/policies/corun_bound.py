"""What a step beside training may take, also before that was ever measured."""

from __future__ import annotations

from harli_appliance.scheduling.types import Bound, Costs, Step

PRIOR = 1.5
"""Slowdown assumed of a co-run while none has been measured; beyond any published penalty (1.24)."""


def corun_bound(step: Step, solo: Bound, costs: Costs) -> tuple[Bound, bool]:
    """The co-run bound, and whether it was measured; a guess from `solo` is what makes measuring possible."""
    bound = costs.corun(step)
    if bound is not None:
        return bound, True
    return Bound(solo.expected_ms * PRIOR, solo.upper_ms * PRIOR), False
