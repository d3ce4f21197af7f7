"""A measured machine for the simulator, and how well the simulator predicts what was measured on it.

Reads the folders of `harli bench run` (a comparison of policies) and `harli bench predictor` (steps). Knows
files and the appliance's default settings; what the simulated runs cost is for `calibrated`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from harli_appliance.bench.compare_plan import ComparePlan, Run, stretch
from harli_appliance.bench.compare_store import Basis, CompareStore
from harli_appliance.bench.comparison import RunResult
from harli_appliance.config import MemorySettings, ModelSettings, TrainingSettings
from harli_appliance.errors import UsageError
from harli_appliance.planner.calibrated import Calibrated, TrainingRates, learn, paces
from harli_appliance.planner.requests import Limits
from harli_appliance.planner.scenario import Fleet, Scenario, run
from harli_appliance.planner.shapes import model_shape

GOAL: Final = 0.15
"""Relative error of the finetune tokens/s of a policy that counts as predicted."""
BESIDE: Final = 0.5
"""Share of a run that must have been spent training beside requests for it to tell how fast that is."""
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
        self.runs: dict[Run, RunResult] = {
            asked: kept.result for asked in self.plan.runs() if (kept := store.read(asked)) is not None
        }

    def fleet(self, steps: Path) -> Fleet:
        """The machine that it was measured on, as steps and rates tell.

        Args:
            steps: ``steps.json`` of `harli bench predictor`.

        Raises:
            UsageError: the file cannot be read or has no steps of a kind that is needed.
        """
        found = _steps(steps)
        learned = learn(found)
        model, memory, training = ModelSettings(), MemorySettings(), TrainingSettings()
        device = Calibrated(
            name="the measured machine",
            model=model_shape(self.plan.model),
            steps=learned,
            paces=paces(found, learned),
            rates=TrainingRates(self.basis.train_alone_tokens_per_s, self._beside()),
            slots=memory.pool_slots,
            window_tokens=training.sizes(gpu=False).window_tokens,
        )
        limits = Limits(model.chunked_prefill_tokens, model.max_running_requests)
        return Fleet(device, limits=limits, micro_batch_tokens=self.plan.sequence_tokens)

    def _beside(self) -> float:
        """Tokens/s beside requests: of the runs that trained most beside them, what training without requests
        did not do. Policies differ in when they train beside requests, not in how fast that goes."""
        alone, found = self.basis.train_alone_tokens_per_s, []
        for result in self.runs.values():
            beside = result.modes.get("partition", 0.0)
            if beside >= BESIDE:
                without = alone * result.modes.get("training", 0.0)
                found.append((result.finetune_tokens_per_s - without) / beside)
        if not found:
            raise UsageError(
                "no measured run trained beside requests for half of its time; measure policy naive as well",
                param="measured",
            )
        return float(np.median(found))

    def validate(self, fleet: Fleet) -> dict[str, Any]:
        """Simulate every measured run; predicted against measured finetune tokens/s of each policy."""
        cells: dict[tuple[str, str, int], list[tuple[RunResult, RunResult]]] = {}
        for asked, result, scenario in self._scenarios(fleet):
            cells.setdefault((asked.policy, asked.slo, asked.load), []).append((result, run(scenario)))
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

    def _scenarios(self, fleet: Fleet) -> Iterator[tuple[Run, RunResult, Scenario]]:
        trace, targets = self.plan.load_trace(), {target.label: target for target in self.basis.targets}
        for asked, result in self.runs.items():
            target = targets[asked.slo]
            rate = target.capacity_per_s * asked.load / 100
            part = stretch(trace, self.plan, rate, asked.repetition)
            scenario = Scenario(
                fleet, asked.policy, part, asked.slo, target.tpot_ms, target.ttft_ms, asked.load,
                asked.repetition, self.plan.lead_s,
            )  # fmt: skip
            yield asked, result, scenario


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


def _steps(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [step for part in content.values() for step in part]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", param="calibration") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{path}: holds no steps ({error}); measure with 'harli bench predictor'", param="calibration"
        ) from error
