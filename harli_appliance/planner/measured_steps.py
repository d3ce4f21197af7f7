"""``steps.json`` of ``harli bench predictor``: what steps of a machine take as a rule, and what units there are.

Steps alone and beside training take what the predictor's model says, fitted to all measured ones at once.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harli_appliance.bench.predictor_errors import PARTS, UNITS, Observed
from harli_appliance.errors import UsageError
from harli_appliance.planner.device import UnitMix
from harli_appliance.scheduling.predictor import features_of, size_of
from harli_appliance.scheduling.regime import Regime
from harli_appliance.scheduling.types import Step

QUANTILE = 0.99
"""Of the regimes' bounds, which nobody asks for here."""


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """Attributes:
    regimes: by the kind of step, and whether training ran beside it.
    """

    regimes: Mapping[tuple[str, bool], Regime]

    @property
    def count(self) -> int:
        return sum(map(len, self.regimes.values()))

    def expected_ms(self, step: Step, *, corun: bool) -> float:
        """What a step takes as a rule.

        Raises:
            UsageError: too few of its kind were measured.
        """
        regime = self.regimes.get((step.kind, corun))
        expected = regime.expected(features_of(step), size=size_of(step)) if regime is not None else math.nan
        if math.isnan(expected):
            how = "beside training" if corun else "alone"
            raise UsageError(
                f"the calibration has too few {step.kind} steps {how}; measure more of them",
                param="calibration",
            )
        return expected


def read_steps(path: Path, layers: int) -> tuple[list[Observed], UnitMix]:
    """
    Args:
        layers: of the model.

    Raises:
        UsageError: the file cannot be read, or is not of that form.
    """
    again = "measure with 'harli bench predictor'"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = [Observed.from_json(entry) for part in PARTS for entry in content[part]]
        return found, unit_mix(content[UNITS], layers)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", param="calibration") from error
    except KeyError as error:
        raise UsageError(f"{path}: {error} is missing; {again}", param="calibration") from error
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"{path}: cannot be used ({error}); {again}", param="calibration") from error


def unit_mix(units: Mapping[str, Mapping[str, float]], layers: int) -> UnitMix:
    """Of ``count`` and ``mean_ms`` by kind; the optimizer's steps belong to no window."""
    kinds = {kind: found for kind, found in units.items() if kind != "step"}
    windows = kinds["forward"]["count"] / layers
    units_ms = sum(found["count"] * found["mean_ms"] for found in kinds.values())
    count = sum(found["count"] for found in kinds.values())
    slowest = max(kinds.values(), key=lambda found: found["mean_ms"])
    return UnitMix(
        forward=layers,
        backward=count / windows - layers,
        forward_share=kinds["forward"]["count"] * kinds["forward"]["mean_ms"] / units_ms,
        slowest=slowest["mean_ms"] / (units_ms / count),
        slow_share=slowest["count"] / count,
    )


def known_tokens(found: Sequence[Observed]) -> int:
    """Of a prompt that is read on its own, how many the prefix cache had as a rule."""
    alone = [one.step for one in found if one.step.kind == "prefill" and one.step.batch == 1]
    return (
        round(statistics.median(step.context_tokens - step.prefill_tokens for step in alone)) if alone else 0
    )


def fit(found: Sequence[Observed]) -> MeasuredSteps:
    """The predictor's model of all of them at once."""
    samples: defaultdict[tuple[str, bool], list[list[Any]]] = defaultdict(list)
    for one in found:
        samples[one.step.kind, one.corun].append(
            [*features_of(one.step), one.measured_ms, 0.0, size_of(one.step)]
        )
    regimes = {}
    for key, rows in samples.items():
        regimes[key] = Regime(QUANTILE, window=len(rows))
        regimes[key].restore(rows, ())
    return MeasuredSteps(regimes)
