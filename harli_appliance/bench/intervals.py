"""How sure a number is: means of repetitions and shares of requests, with confidence intervals at 95%."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy import stats

CONFIDENCE: Final = 0.95


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent repetitions, and half the width of its interval (Student's t); None in its place with
    fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error


def share_interval(good: int, total: int) -> tuple[float, float] | None:
    """Wilson's interval of a share of independent requests; None without any."""
    if total == 0:
        return None
    found = stats.binomtest(good, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)
