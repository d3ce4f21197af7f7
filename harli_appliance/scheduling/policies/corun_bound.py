"""What a step beside training may take, also before that was ever measured."""

from __future__ import annotations

from harli_appliance.scheduling.types import Bound, Costs, Split, Step

PRIOR = 1.5
"""Slowdown assumed of a co-run while none has been measured; beyond any published penalty (1.24)."""


def corun_bound(step: Step, costs: Costs, split: Split | None) -> Bound | None:
    """The co-run bound on a split. Where none was measured yet, a guess from the step alone, which is what makes
    measuring possible; None when that is not known either."""
    solo = costs.solo(step, split)
    if solo is None:
        return None
    return costs.corun(step, split) or Bound(solo.expected_ms * PRIOR, solo.upper_ms * PRIOR)
