"""One regime of latencies: a non-negative linear model, and how far reality strays from it.

A prediction alone promises nothing, so `bound` raises it by a quantile of recent relative residuals, each taken
before its step was learned from (split conformal prediction). The quantile's level follows the misses (adaptive
conformal inference, Gibbs and Candes 2021, arXiv 2106.00170), so that the share of steps above the bound is the
promised one also while the device drifts. A device that has become slower or faster altogether is recognised
after `DRIFT` steps, and what was learned is scaled with it.

Knows numbers; does not know steps, splits or policies.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from harli_appliance.scheduling.types import Bound

WINDOW = 512
"""Samples kept."""
REFIT = 16
"""New samples between two fits."""
ENOUGH = 8
"""Samples below which nothing is predicted."""
DRIFT = 8
"""Consecutive steps that must all be off, to the same side, before the model is scaled to them."""
DRIFTED = 0.15
"""Relative error that counts as off."""
CAUTION = 1.0
"""Divided by the number of residuals and added to the bound while they are too few for the quantile."""
RATE = 0.005
"""How fast the quantile's level follows misses: one miss halves a level of 1%."""
LEVELS = (0.4, 2.0)
"""Range of the level, in promised shares: in a full window one outlier alone is never the bound."""

Features = tuple[float, ...]


class Regime:
    """Learns ``total = base + f(features)``, f non-negative linear; `base` is what another regime explains.

    Args:
        quantile: share of steps that must stay under the bound, in (0.5, 1).
    """

    def __init__(self, quantile: float) -> None:
        self._target = self._level = 1.0 - quantile
        self._samples: deque[tuple[Features, float, float]] = deque(maxlen=WINDOW)
        self._residuals: deque[float] = deque()
        self._sorted: list[float] = []
        self._recent: deque[float] = deque(maxlen=DRIFT)
        self._coefficients: tuple[float, ...] | None = None
        self._since_fit = 0
        self._margin_now: float | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def bound(self, features: Features, base: float = 0.0) -> Bound | None:
        """The expected total and its bound; None before there are enough samples."""
        if self._coefficients is None or not self._sorted or not math.isfinite(base):
            return None
        expected = base + self._predict(features)
        if expected <= 0.0:
            return None
        if self._margin_now is None:
            self._margin_now = self._margin()
        return Bound(expected, expected * (1.0 + self._margin_now))

    def expected(self, features: Features) -> float:
        """f(features); NaN before there are enough samples."""
        return self._predict(features) if self._coefficients is not None else math.nan

    def add(self, features: Features, total: float, base: float = 0.0) -> Bound | None:
        """Learn from one step; the bound that had been predicted for it."""
        bound = self.bound(features, base)
        self._margin_now = None
        if bound is not None:
            missed = total > bound.upper_ms
            low, high = (factor * self._target for factor in LEVELS)
            self._level = min(high, max(low, self._level + RATE * (self._target - missed)))
            self._residual(total / bound.expected_ms - 1.0)
        self._samples.append((features, total, base))
        self._since_fit += 1
        if self._drifted():
            self._scale(1.0 + sorted(self._recent)[DRIFT // 2])
        elif len(self._samples) >= ENOUGH and (self._coefficients is None or self._since_fit >= REFIT):
            self._fit()
        return bound

    # -- how far off -------------------------------------------------------------------------------------

    def _margin(self) -> float:
        """Conformal: the k-th smallest of n residuals with k = ceil((n + 1) (1 - level))."""
        count = len(self._sorted)
        rank = math.ceil((count + 1) * (1.0 - self._level))
        if rank <= count:
            return max(0.0, self._sorted[rank - 1])
        return max(0.0, self._sorted[-1]) + CAUTION / count

    def _residual(self, value: float) -> None:
        self._recent.append(value)
        self._residuals.append(value)
        bisect.insort(self._sorted, value)
        if len(self._residuals) > WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._residuals.popleft())]

    def _drifted(self) -> bool:
        if len(self._recent) < DRIFT:
            return False
        return min(self._recent) > DRIFTED or max(self._recent) < -DRIFTED

    def _scale(self, factor: float) -> None:
        """Everything takes `factor` times as long now; the samples that showed it are known already."""
        kept = list(self._samples)
        older = [(features, total * factor, base) for features, total, base in kept[:-DRIFT]]
        self._samples = deque(older + kept[-DRIFT:], maxlen=WINDOW)
        for value in self._recent:  # they tell of the drift, not of the noise around what is learned now
            self._residuals.remove(value)
            self._sorted.remove(value)
        self._recent.clear()
        self._fit()

    # -- the model ---------------------------------------------------------------------------------------

    def _predict(self, features: Features) -> float:
        return sum(map(float.__mul__, self._coefficients or (), features))

    def _fit(self) -> None:
        matrix = np.array([features for features, _, _ in self._samples])
        totals = np.array([total for _, total, _ in self._samples])
        values = totals - np.array([base for _, _, base in self._samples])
        # Weighting rows by 1/total minimises relative error, which is what the bound is stated in; columns
        # are scaled because nnls works with absolute tolerances.
        weight = 1.0 / totals
        scale = np.maximum(np.abs(matrix * weight[:, None]).max(axis=0), 1e-12)
        solution, _ = nnls(matrix * weight[:, None] / scale, np.maximum(values, 0.0) * weight)
        self._coefficients = tuple((solution / scale).tolist())
        self._since_fit = 0
        if not self._sorted:  # nothing was predicted yet: how well the first samples are explained has to do
            for features, total, base in self._samples:
                expected = base + self._predict(features)
                if expected > 0.0:
                    self._residual(total / expected - 1.0)
            self._recent.clear()

    # -- persistence -------------------------------------------------------------------------------------

    def state(self) -> dict[str, list[list[float]] | list[float]]:
        """Samples as [*features, total, base], and the residuals."""
        return {
            "samples": [[*features, total, base] for features, total, base in self._samples],
            "residuals": list(self._residuals),
        }

    def restore(self, samples: Sequence[Sequence[float]], residuals: Sequence[float]) -> None:
        for *features, total, base in samples:
            self._samples.append((tuple(map(float, features)), float(total), float(base)))
        for value in residuals:
            self._residual(float(value))
        self._margin_now = None
        self._recent.clear()
        if len(self._samples) >= ENOUGH:
            self._fit()
