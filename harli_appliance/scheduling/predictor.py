"""How long a serving step takes: alone, and with a work unit running beside it.

Two stages (Harli, arXiv 2511.11729, section on latency prediction):

- solo: ``t = c + a b + k n + p m``, non-negative, for batch size b, context tokens n, prefill tokens m;
- co-run: ``t = solo + e``, where the slowdown e >= 0 is a non-negative linear function of the same features,
  fitted to what co-run steps took beyond their solo prediction.

A prediction alone promises nothing, so decisions use an upper bound: the prediction times (1 + q), where q is the
chosen quantile of recent relative residuals of that regime (split conformal prediction: with exchangeable
residuals, at most 1 - quantile of the steps exceed it). Prefill and decode are fitted apart.

Pure Python and numpy; refitted online every `REFIT` samples from a window of the most recent ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from harli_appliance.scheduling.types import Bound, Step

WINDOW = 512
"""Samples kept for each regime."""
REFIT = 16
"""New samples between two fits."""
ENOUGH = 8
"""Samples of a regime below which nothing is predicted for it."""

_VERSION = 1


def _features(step: Step) -> list[float]:
    return [1.0, float(step.batch), float(step.context_tokens), float(step.prefill_tokens)]


class _Regime:
    """One non-negative linear model with its recent samples and residuals."""

    def __init__(self) -> None:
        self.samples: deque[tuple[list[float], float]] = deque(maxlen=WINDOW)
        self.residuals: deque[float] = deque(maxlen=WINDOW)
        self.coefficients: NDArray[np.float64] | None = None
        self._since_fit = 0

    def add(self, features: list[float], value: float) -> None:
        self.samples.append((features, value))
        self._since_fit += 1
        if len(self.samples) >= ENOUGH and (self.coefficients is None or self._since_fit >= REFIT):
            self.fit()

    def fit(self) -> None:
        matrix = np.array([features for features, _ in self.samples])
        values = np.array([value for _, value in self.samples])
        # Weighting rows by 1/value minimises relative error, which is what the bound is stated in; columns
        # are scaled because nnls works with absolute tolerances.
        weight = 1.0 / np.maximum(np.abs(values), 1e-3)
        scale = np.maximum(np.abs(matrix * weight[:, None]).max(axis=0), 1e-12)
        solution, _ = nnls(matrix * weight[:, None] / scale, np.maximum(values, 0.0) * weight)
        self.coefficients = solution / scale
        self._since_fit = 0

    def predict(self, features: list[float]) -> float:
        if self.coefficients is None:
            return math.nan
        return float(np.dot(self.coefficients, features))


class Predictor:
    """Step latency on one device and model.

    Args:
        quantile: share of steps that must stay under the bound, in (0.5, 1).
    """

    def __init__(self, quantile: float = 0.99) -> None:
        if not 0.5 < quantile < 1.0:
            raise ValueError(f"quantile must lie in (0.5, 1), got {quantile}")
        self._quantile = quantile
        self._solo = {"prefill": _Regime(), "decode": _Regime()}
        self._extra = {"prefill": _Regime(), "decode": _Regime()}
        self._errors: deque[float] = deque(maxlen=WINDOW)
        self._above: deque[bool] = deque(maxlen=WINDOW)

    def solo(self, step: Step) -> Bound | None:
        """The step alone; None until there are enough samples."""
        regime = self._solo[step.kind]
        return self._bound(regime.predict(_features(step)), regime)

    def corun(self, step: Step) -> Bound | None:
        """The step with a work unit beside it; None until both stages have enough samples."""
        features = _features(step)
        extra = self._extra[step.kind]
        return self._bound(self._solo[step.kind].predict(features) + extra.predict(features), extra)

    def _bound(self, expected: float, regime: _Regime) -> Bound | None:
        if not math.isfinite(expected) or expected <= 0.0 or len(regime.residuals) < ENOUGH:
            return None
        margin = float(np.quantile(regime.residuals, self._quantile, method="higher"))
        return Bound(expected, expected * (1.0 + max(0.0, margin)))

    def observe(self, step: Step, measured_ms: float, *, corun: bool) -> None:
        """Learn from a step that took `measured_ms`; values that cannot be times are ignored."""
        if not math.isfinite(measured_ms) or measured_ms <= 0.0:
            return
        features = _features(step)
        bound = self.corun(step) if corun else self.solo(step)
        if bound is not None:
            self._errors.append(abs(bound.expected_ms - measured_ms) / measured_ms)
            self._above.append(measured_ms > bound.upper_ms)
        solo = self._solo[step.kind]
        if not corun:
            solo.add(features, measured_ms)
            self._residual(solo, solo.predict(features), measured_ms)
            return
        alone = solo.predict(features)
        if not math.isfinite(alone):
            return  # no first stage yet to measure the slowdown against
        extra = self._extra[step.kind]
        extra.add(features, measured_ms - alone)
        self._residual(extra, alone + extra.predict(features), measured_ms)

    @staticmethod
    def _residual(regime: _Regime, predicted: float, measured: float) -> None:
        if math.isfinite(predicted) and predicted > 0.0:
            regime.residuals.append(measured / predicted - 1.0)

    # -- report and persistence -------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        return sum(len(r.samples) for r in (*self._solo.values(), *self._extra.values()))

    @property
    def median_error(self) -> float | None:
        """Median relative error of the predictions made before each recent step."""
        return float(np.median(self._errors)) if self._errors else None

    @property
    def above_bound(self) -> float | None:
        """Share of recent steps that exceeded the bound predicted for them."""
        return sum(self._above) / len(self._above) if self._above else None

    def state(self) -> dict[str, Any]:
        """Everything learned, as JSON."""
        return {
            "version": _VERSION,
            "regimes": {
                f"{stage}/{kind}": {
                    "samples": [[*features, value] for features, value in regime.samples],
                    "residuals": list(regime.residuals),
                }
                for stage, kind, regime in self._regimes()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one from another version is ignored, since it can be learned again."""
        if state.get("version") != _VERSION:
            return
        for stage, kind, regime in self._regimes():
            saved: Mapping[str, Sequence[Any]] = state["regimes"].get(f"{stage}/{kind}", {})
            for *features, value in saved.get("samples", ()):
                regime.samples.append((features, value))
            regime.residuals.extend(saved.get("residuals", ()))
            if len(regime.samples) >= ENOUGH:
                regime.fit()

    def _regimes(self) -> list[tuple[str, str, _Regime]]:
        return [
            (stage, kind, regime)
            for stage, regimes in (("solo", self._solo), ("corun", self._extra))
            for kind, regime in regimes.items()
        ]
