"""One regime of latencies: a non-negative linear model, what sizes do beside it, and how far reality strays.

Kernels work on whole tiles, so that time does not grow evenly with the size of a batch: what the linear model says
is multiplied by the median of what samples of the same size took beyond it, shrunk while these are few.

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
import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
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
SHRINK = 4.0
"""Samples of one size that count as much as the linear model does."""
LEVELS = (0.4, 2.0)
"""Range of the level, in promised shares: in a full window one outlier alone is never the bound."""

Features = tuple[float, ...]


class _Sample(NamedTuple):
    features: Features
    total: float
    base: float
    size: int | None


class Regime:
    """Learns ``total = (base + f(features)) g(size)``, f non-negative linear; `base` is what another one explains.

    Args:
        quantile: share of steps that must stay under the bound, in (0.5, 1).
        window: samples that are kept.
    """

    def __init__(self, quantile: float, window: int = WINDOW) -> None:
        self._target = self._level = 1.0 - quantile
        self._samples: deque[_Sample] = deque(maxlen=window)
        self._residuals: deque[float] = deque()
        self._sorted: list[float] = []
        self._recent: deque[float] = deque(maxlen=DRIFT)
        self._coefficients: tuple[float, ...] | None = None
        self._by_size: dict[int, float] = {}
        self._since_fit = 0
        self._margin_now: float | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def bound(self, features: Features, base: float = 0.0, size: int | None = None) -> Bound | None:
        """The expected total and its bound; None before there are enough samples."""
        expected = self.expected(features, base, size)
        if not self._sorted or not 0.0 < expected < math.inf:
            return None
        if self._margin_now is None:
            self._margin_now = self._margin()
        return Bound(expected, expected * (1.0 + self._margin_now))

    def expected(self, features: Features, base: float = 0.0, size: int | None = None) -> float:
        """The expected total; NaN before there are enough samples."""
        if self._coefficients is None:
            return math.nan
        linear = base + self._predict(features)
        return linear if size is None else linear * self._by_size.get(size, 1.0)

    def judge(self, total: float, bound: Bound) -> None:
        """Learn how wrong a prediction was; from now on bounds are as wide as that asks for."""
        self._margin_now = None
        low, high = (factor * self._target for factor in LEVELS)
        self._level = min(high, max(low, self._level + RATE * (self._target - (total > bound.upper_ms))))
        self._residual(total / bound.expected_ms - 1.0)

    def add(self, features: Features, total: float, base: float = 0.0, size: int | None = None) -> None:
        """Learn from one step."""
        self._margin_now = None
        self._samples.append(_Sample(features, total, base, size))
        self._since_fit += 1
        if self._drifted():
            self._scale(1.0 + sorted(self._recent)[DRIFT // 2])
        elif len(self._samples) >= ENOUGH and (self._coefficients is None or self._since_fit >= REFIT):
            self._fit()

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
        older = [sample._replace(total=sample.total * factor) for sample in kept[:-DRIFT]]
        self._samples = deque(older + kept[-DRIFT:], maxlen=self._samples.maxlen)
        for value in self._recent:  # they tell of the drift, not of the noise around what is learned now
            self._residuals.remove(value)
            self._sorted.remove(value)
        self._recent.clear()
        self._fit()

    # -- the model ---------------------------------------------------------------------------------------

    def _predict(self, features: Features) -> float:
        return sum(map(float.__mul__, self._coefficients or (), features))

    def _fit(self) -> None:
        matrix = np.array([sample.features for sample in self._samples])
        totals = np.array([sample.total for sample in self._samples])
        bases = np.array([sample.base for sample in self._samples])
        # Weighting rows by 1/total minimises relative error, which is what the bound is stated in; columns
        # are scaled because nnls works with absolute tolerances.
        weight = 1.0 / totals
        scale = np.maximum(np.abs(matrix * weight[:, None]).max(axis=0), 1e-12)
        solution, _ = nnls(matrix * weight[:, None] / scale, np.maximum(totals - bases, 0.0) * weight)
        self._coefficients = tuple((solution / scale).tolist())
        self._since_fit = 0
        linear = bases + matrix @ (solution / scale)
        self._by_size = _beyond(totals / np.maximum(linear, 1e-12), [sample.size for sample in self._samples])
        if not self._sorted:  # nothing was predicted yet: how well the first samples are explained has to do
            for features, total, base, size in self._samples:
                expected = self.expected(features, base, size)
                if expected > 0.0:
                    self._residual(total / expected - 1.0)
            self._recent.clear()

    # -- persistence -------------------------------------------------------------------------------------

    def state(self) -> dict[str, list[list[Any]] | list[float]]:
        """Samples as [*features, total, base, size], and the residuals."""
        return {
            "samples": [[*features, total, base, size] for features, total, base, size in self._samples],
            "residuals": list(self._residuals),
        }

    def restore(self, samples: Sequence[Sequence[Any]], residuals: Sequence[float]) -> None:
        for *features, total, base, size in samples:
            self._samples.append(_Sample(tuple(map(float, features)), float(total), float(base), size))
        for value in residuals:
            self._residual(float(value))
        self._margin_now = None
        self._recent.clear()
        if len(self._samples) >= ENOUGH:
            self._fit()


def _beyond(ratios: NDArray[np.float64], sizes: Sequence[int | None]) -> dict[int, float]:
    """For each size the median of its ratios, drawn towards 1 while there are few."""
    groups: defaultdict[int, list[float]] = defaultdict(list)
    for ratio, size in zip(ratios.tolist(), sizes, strict=True):
        if size is not None:
            groups[size].append(ratio)
    return {
        size: statistics.median(found) ** (len(found) / (len(found) + SHRINK))
        for size, found in groups.items()
    }
