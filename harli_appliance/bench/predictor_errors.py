"""How wrong the latency predictor is on steps that it has not learned from, for each kind of step.

Knows steps that were observed and the predictor; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Bound, Split, Step

STEPS: Final = "steps.json"
"""File of observed steps, by part."""
PARTS: Final = ("learned", "held_out")
UNITS: Final = "units"
"""In that file: training, by the kind of its units."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A step as the predictor was told of it."""

    step: Step
    measured_ms: float
    corun: bool
    split: Split | None
    fused_tokens: int

    @property
    def regime(self) -> str:
        """What kind of step it was, e.g. "decode, co-run"."""
        beside = "fused" if self.fused_tokens else "co-run" if self.corun else "solo"
        return f"{self.step.kind}, {beside}" + (f", {self.split.name}" if self.split else "")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Observed:
        split = found["split"]
        return cls(
            Step(**found["step"]),
            float(found["measured_ms"]),
            found["corun"],
            Split(**split) if split is not None else None,
            found["fused_tokens"],
        )

    def bound(self, predictor: Predictor) -> Bound | None:
        """What the predictor says about such a step."""
        if self.fused_tokens:
            return predictor.fused(self.step, self.fused_tokens)
        ask = predictor.corun if self.corun else predictor.solo
        return ask(self.step, self.split)

    def teach(self, predictor: Predictor) -> None:
        predictor.observe(
            self.step,
            self.measured_ms,
            corun=self.corun,
            split=self.split,
            fused_tokens=self.fused_tokens,
        )


class Recorder(Predictor):
    """A predictor that keeps every step that it is told of, besides learning from it."""

    def __init__(self, quantile: float = 0.99) -> None:
        super().__init__(quantile)
        self.seen: list[Observed] = []

    def observe(
        self,
        step: Step,
        measured_ms: float,
        *,
        corun: bool = False,
        split: Split | None = None,
        fused_tokens: int = 0,
    ) -> None:
        self.seen.append(Observed(step, measured_ms, corun, split, fused_tokens))
        super().observe(step, measured_ms, corun=corun, split=split, fused_tokens=fused_tokens)


def errors(learned: Iterable[Observed], held_out: Sequence[Observed], quantile: float) -> dict[str, Any]:
    """Errors on `held_out` after learning from `learned`.

    Returns:
        ``frozen`` (nothing of the held-out steps is learned) and ``online`` (each one is learned from after it was
        predicted, as the appliance does), each with ``all`` and ``regimes``; see `_errors_of`.
    """
    found: dict[str, Any] = {}
    for name, online in (("frozen", False), ("online", True)):
        predictor = Predictor(quantile)
        for observed in learned:
            observed.teach(predictor)
        if not online:  # what the machine was like at the end of it is no knowledge of later steps
            learnt, predictor = predictor.state(), Predictor(quantile)
            predictor.restore(learnt)
        judged: list[tuple[Observed, Bound | None]] = []
        for observed in held_out:
            judged.append((observed, observed.bound(predictor)))
            if online:
                observed.teach(predictor)
        regimes = sorted({observed.regime for observed in held_out})
        found[name] = {
            "all": _errors_of(judged),
            "regimes": {
                regime: _errors_of([pair for pair in judged if pair[0].regime == regime])
                for regime in regimes
            },
        }
    return found


def repeats(held_out: Sequence[Observed]) -> dict[str, Any]:
    """How far two steps differ that the predictor cannot tell apart: decode steps straight after one another, of
    as many requests and both alone or both beside training. What follows the machine's newest pace is about as
    wrong as that; what is much better knows more than the predictor is told.

    Returns:
        ``steps`` that came after such a step, and the median of |before - measured| / measured; None without any.
    """
    changes = [
        abs(before.measured_ms - observed.measured_ms) / observed.measured_ms
        for before, observed in pairwise(held_out)
        if observed.step.kind == before.step.kind == "decode"
        and (observed.regime, observed.step.batch) == (before.regime, before.step.batch)
    ]
    return {
        "steps": len(changes),
        "median_change": round(float(np.median(changes)), 5) if changes else None,
    }


def _errors_of(judged: Sequence[tuple[Observed, Bound | None]]) -> dict[str, Any]:
    """Median and 90th percentile of |expected - measured| / measured, the share of steps above the bound, and how
    much the bound lies above what was measured in the median; None where nothing was predicted."""
    known = [(observed.measured_ms, bound) for observed, bound in judged if bound is not None]
    if not known:
        return {
            "steps": len(judged),
            "predicted": 0,
            "median_error": None,
            "p90_error": None,
            "above_bound": None,
            "median_margin": None,
        }
    measured = np.array([value for value, _ in known])
    expected = np.array([bound.expected_ms for _, bound in known])
    upper = np.array([bound.upper_ms for _, bound in known])
    relative = np.abs(expected - measured) / measured
    return {
        "steps": len(judged),
        "predicted": len(known),
        "median_error": round(float(np.median(relative)), 5),
        "p90_error": round(float(np.percentile(relative, 90)), 5),
        "above_bound": round(float((measured > upper).mean()), 5),
        "median_margin": round(float(np.median(upper / measured) - 1.0), 5),
    }
