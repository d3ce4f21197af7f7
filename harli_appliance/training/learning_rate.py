"""The learning rate of each optimizer step: a linear warm-up, then a schedule. Pure arithmetic."""

from __future__ import annotations

import math

from harli_appliance.schema import LearningRateSchedule

FLOOR = 0.1
"""Share of the peak that cosine and linear fall to at the end."""


def learning_rate(
    schedule: LearningRateSchedule, peak: float, step: int, total_steps: int, warmup_ratio: float
) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Args:
        warmup_ratio: share of all steps over which the rate rises; at least one step unless it is 0.
    """
    warmup = max(1, round(warmup_ratio * total_steps)) if warmup_ratio else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (FLOOR + (1 - FLOOR) * left)
