"""How long a serving step takes: alone, beside training, and with training tokens in the same pass.

Two stages (Harli, arXiv 2511.11729, section on latency prediction), for each kind of step and each split:

- solo: ``t = c + a b + k n + p m``, non-negative, for batch size b, context tokens n, prefill tokens m;
- co-run: ``t = solo + e``, where the slowdown e >= 0 is a non-negative linear function of the same features;
- fused: ``t = solo + e`` with e convex and piecewise linear in the number of training tokens that ride along.

A machine that is shared is slower for a second and fast again, all kinds of steps at once. What that makes of the
next step is a factor on everything, the `pace`, which follows the newest steps; models learn what steps take
without it.

Each comes with an upper bound that steps exceed as rarely as promised (`regime.py`). What is not known is None.
Pure Python where a decision waits for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from harli_appliance.scheduling.regime import WINDOW, Features, Regime
from harli_appliance.scheduling.types import Bound, Split, Step

Stage = Literal["solo", "corun", "fused"]

_VERSION = 4
PACE_WEIGHT = 0.5
"""Of the newest step in the pace."""
PACE_STEP = 0.5
"""Of the logarithm by which the newest step was off, so much counts at most: one outlier is no change of pace."""
KNEES = (64.0, 128.0, 192.0, 256.0, 384.0)
"""Numbers of fused tokens at which their price may rise."""
_RATE_WEIGHT = 0.05
"""Of the newest unit in the average training rate."""


class Predictor:
    """Latencies on one device and model, as policies ask for them (`types.Costs`).

    Args:
        quantile: share of steps that must stay under the bound, in (0.5, 1).
    """

    def __init__(self, quantile: float = 0.99) -> None:
        if not 0.5 < quantile < 1.0:
            raise ValueError(f"quantile must lie in (0.5, 1), got {quantile}")
        self._quantile = quantile
        self._regimes: dict[tuple[Stage, str, str], Regime] = {}
        self._rates: dict[str, float] = {}
        self._log_pace = 0.0
        self._errors: deque[float] = deque(maxlen=WINDOW)
        self._above: deque[bool] = deque(maxlen=WINDOW)

    # -- what policies ask -------------------------------------------------------------------------------

    def solo(self, step: Step, split: Split | None = None) -> Bound | None:
        """The step alone; None until there are enough samples."""
        return self._now(self._bound("solo", step, split))

    def corun(self, step: Step, split: Split | None = None) -> Bound | None:
        """The step with a work unit beside it; None until both stages have enough samples."""
        return self._now(self._bound("corun", step, split))

    def fused(self, step: Step, tokens: int) -> Bound | None:
        """The step with `tokens` training tokens in the same pass; None until it was seen often enough."""
        return self._now(self._bound("fused", step, None, tokens))

    def training_rate(self, split: Split | None = None) -> float:
        """Tokens trained per second of the training lane's time beside serving on `split`; NaN unknown."""
        return self._rates.get(_name(split), math.nan)

    # -- what is learned ---------------------------------------------------------------------------------

    def observe(
        self,
        step: Step,
        measured_ms: float,
        *,
        corun: bool = False,
        split: Split | None = None,
        fused_tokens: int = 0,
    ) -> None:
        """Learn from a step that took `measured_ms`; values that cannot be times are ignored.

        Args:
            corun: whether training ran beside the whole of it.
            fused_tokens: training tokens that were in the same pass.
        """
        if not math.isfinite(measured_ms) or measured_ms <= 0.0:
            return
        stage: Stage = "fused" if fused_tokens else "corun" if corun else "solo"
        place = None if fused_tokens else split
        base = 0.0 if stage == "solo" else self._alone(step, place)
        if not math.isfinite(base):
            return  # no first stage yet to measure the slowdown against
        key = (stage, step.kind, _name(place))
        regime = self._regimes.get(key)
        if regime is None:
            regime = self._regimes[key] = Regime(self._quantile)
        features, size = features_of(step, fused_tokens), size_of(step)
        usual = regime.bound(features, base, size)
        if usual is not None:
            predicted = self._at_pace(usual)
            regime.judge(measured_ms, predicted)
            self._errors.append(abs(predicted.expected_ms - measured_ms) / measured_ms)
            self._above.append(measured_ms > predicted.upper_ms)
            off = math.log(measured_ms / predicted.expected_ms)
            self._log_pace += PACE_WEIGHT * min(PACE_STEP, max(-PACE_STEP, off))
        regime.add(features, measured_ms / self.pace, base, size)

    def observe_training(self, tokens: float, seconds: float, split: Split | None = None) -> None:
        """Learn how fast training goes: tokens done (parts count) in `seconds` of the training lane's time."""
        if not (seconds > 0.0 and math.isfinite(tokens)):
            return
        rate, name = tokens / seconds, _name(split)
        before = self._rates.get(name, rate)
        self._rates[name] = before + _RATE_WEIGHT * (rate - before)

    @property
    def pace(self) -> float:
        """How many times slower than usual the device is just now."""
        return math.exp(self._log_pace)

    def _now(self, usual: Bound | None) -> Bound | None:
        return self._at_pace(usual) if usual is not None else None

    def _at_pace(self, usual: Bound) -> Bound:
        pace = self.pace
        return Bound(pace * usual.expected_ms, pace * usual.upper_ms)

    def _bound(self, stage: Stage, step: Step, split: Split | None, fused_tokens: int = 0) -> Bound | None:
        """At the usual pace."""
        regime = self._regimes.get((stage, step.kind, _name(split)))
        if regime is None:
            return None
        base = 0.0 if stage == "solo" else self._alone(step, split)
        return regime.bound(features_of(step, fused_tokens), base, size_of(step))

    def _alone(self, step: Step, split: Split | None) -> float:
        regime = self._regimes.get(("solo", step.kind, _name(split)))
        return regime.expected(features_of(step), size=size_of(step)) if regime is not None else math.nan

    # -- report and persistence -------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        return sum(map(len, self._regimes.values()))

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
            "regimes": {"/".join(key): regime.state() for key, regime in self._regimes.items()},
            "training_rates": dict(self._rates),
        }

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Take over a saved state; False for one of another version, which is of no use."""
        if state.get("version") != _VERSION:
            return False
        for key, saved in state["regimes"].items():
            stage, kind, split = key.split("/", 2)
            regime = self._regimes.setdefault((stage, kind, split), Regime(self._quantile))
            regime.restore(saved["samples"], saved["residuals"])
        self._rates.update(state["training_rates"])
        return True


def features_of(step: Step, fused_tokens: int = 0) -> Features:
    """Of a fused step those of the training tokens, piecewise linear and convex: a step that waits for memory has
    room for some tokens before they cost time."""
    if fused_tokens:
        return (1.0, float(fused_tokens), *(max(0.0, fused_tokens - knee) for knee in KNEES))
    return (1.0, float(step.batch), float(step.context_tokens), float(step.prefill_tokens))


def size_of(step: Step) -> int | None:
    return step.batch if step.kind == "decode" else None


def _name(split: Split | None) -> str:
    return split.name if split is not None else ""
