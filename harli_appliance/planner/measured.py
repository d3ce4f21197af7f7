"""A measured machine for the simulator, and how well the simulator predicts what was measured on it.

Reads the folders of `harli bench run` (a comparison of policies) and `harli bench predictor` (steps). Knows
files and the appliance's default settings; what the simulated runs cost is for `calibrated`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from harli_appliance.bench.compare_plan import ComparePlan, Run, stretch
from harli_appliance.bench.compare_store import Basis, CompareStore, RunFile
from harli_appliance.bench.comparison import RunResult
from harli_appliance.config import ModelSettings, TrainingSettings
from harli_appliance.errors import UsageError
from harli_appliance.models.size import USUAL_SLOTS
from harli_appliance.planner.calibrated import Calibrated
from harli_appliance.planner.measured_steps import MeasuredSteps, fit, known_tokens, read_steps
from harli_appliance.planner.paces import TrainingRates, paces_and_noise, paces_of, rates_of
from harli_appliance.planner.requests import Limits
from harli_appliance.planner.scenario import Fleet, Scenario, run
from harli_appliance.planner.shapes import model_shape

GOAL: Final = 0.15
"""Relative error of the finetune tokens/s of a policy that counts as predicted."""
FEW_TOKENS_PER_S: Final = 1.0
"""Below this a relative error says nothing: so slow a policy is predicted when the simulator says so too."""


class Measured:
    """A comparison that was measured, in `folder`.

    Raises:
        UsageError: the folder holds none, or none from which the speed of training beside requests can be told.
    """

    def __init__(self, folder: Path) -> None:
        store = CompareStore(folder)
        basis = store.basis()
        if basis is None:
            raise UsageError(
                f"{folder}: holds no comparison; make one with 'harli bench run'", param="measured"
            )
        self.basis: Basis = basis
        self.plan: ComparePlan = store.plan()
        self.runs: dict[Run, RunFile] = {
            asked: kept for asked in self.plan.runs() if (kept := store.read(asked)) is not None
        }

    def fleet(self, steps: Path) -> Fleet:
        """The machine that it was measured on, as steps and rates tell.

        Args:
            steps: ``steps.json`` of `harli bench predictor`.

        Raises:
            UsageError: the file cannot be read or has no steps of a kind that is needed.
        """
        shape = model_shape(self.plan.model)
        found, units = read_steps(steps, shape.layers)
        learned = fit(found)
        paces, noises = paces_and_noise(found, learned)
        step = ModelSettings().limits(gpu=False)
        device = Calibrated(
            name="the measured machine",
            model=shape,
            steps=learned,
            rates=self._rates(learned),
            slots=USUAL_SLOTS,
            window_tokens=TrainingSettings().sizes(gpu=False).window_tokens,
            units=units,
            paces=paces,
            noises=noises,
        )
        limits = Limits(step.chunked_prefill_tokens, step.max_running_requests, known_tokens(found))
        return Fleet(device, limits=limits, micro_batch_tokens=self.plan.sequence_tokens)

    def _rates(self, steps: MeasuredSteps) -> TrainingRates:
        """Policies differ in when they train beside requests, not in how fast that goes."""
        found = rates_of((kept, paces_of(kept, steps)) for kept in self.runs.values())
        if found is None:
            raise UsageError(
                "no measured run trained for long beside requests and without any; measure policy naive as well",
                param="measured",
            )
        return found

    def validate(self, fleet: Fleet) -> dict[str, Any]:
        """Simulate every measured run, on the machine as it was then; predicted against measured finetune tokens/s
        of each policy."""
        cells: dict[tuple[str, str, int], list[tuple[RunResult, RunResult]]] = {}
        for asked, scenario in self._scenarios(fleet):
            pair = self.runs[asked].result, run(scenario)
            cells.setdefault((asked.policy, asked.slo, asked.load), []).append(pair)
        rows = [
            _row(*key, *zip(*pairs, strict=True))  # measured results, simulated results
            for key, pairs in cells.items()
        ]
        predicted = sum(row["predicted_within_goal"] for row in rows)
        return {
            "simulated": True,
            "goal": GOAL,
            "machine": fleet.device.describe(),
            "within_goal": predicted / len(rows) if rows else None,
            "median_error": float(np.median([row["error"] for row in rows])) if rows else None,
            "cells": rows,
        }

    def _scenarios(self, fleet: Fleet) -> Iterator[tuple[Run, Scenario]]:
        trace, targets = self.plan.load_trace(), {target.label: target for target in self.basis.targets}
        for asked, kept in self.runs.items():
            target, device = targets[asked.slo], fleet.device
            if isinstance(device, Calibrated):
                device = replace(device, paces=paces_of(kept, device.steps))
            part = stretch(trace, self.plan, target.capacity_per_s * asked.load / 100, asked.repetition)
            scenario = Scenario(
                replace(fleet, device=device), asked.policy, part, asked.slo, target.tpot_ms, target.ttft_ms,
                asked.load, asked.repetition, self.plan.lead_s, since_s=0.0,
            )  # fmt: skip
            yield asked, scenario


def _row(
    policy: str, slo: str, load: int, measured: tuple[RunResult, ...], simulated: tuple[RunResult, ...]
) -> dict[str, Any]:
    was = float(np.mean([result.finetune_tokens_per_s for result in measured]))
    said = float(np.mean([result.finetune_tokens_per_s for result in simulated]))
    error = abs(said - was) / was if was >= FEW_TOKENS_PER_S else float(said >= FEW_TOKENS_PER_S)
    return {
        "policy": policy,
        "slo": slo,
        "load": load,
        "measured_tokens_per_s": round(was, 3),
        "predicted_tokens_per_s": round(said, 3),
        "error": round(error, 4),
        "predicted_within_goal": error <= GOAL,
        "measured_attainment": _attainment(measured),
        "predicted_attainment": _attainment(simulated),
    }


def _attainment(results: tuple[RunResult, ...]) -> float | None:
    requests = sum(result.requests for result in results)
    return sum(result.good for result in results) / requests if requests else None
