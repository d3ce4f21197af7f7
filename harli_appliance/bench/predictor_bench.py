"""``harli bench predictor``: how wrong the latency predictor is on steps that it has not seen, against goals.

The steps come from an engine in a process of its own (`predictor_run`). Knows the goals, prints the table and
writes ``predictor.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from harli_appliance import __version__
from harli_appliance.bench.compare_plan import ComparePlan, without_folders
from harli_appliance.bench.engine_bench import measure_in_engine
from harli_appliance.bench.machine import describe_machine
from harli_appliance.bench.predictor_errors import PARTS, STEPS, Observed, errors, repeats
from harli_appliance.config import Settings

QUANTILE: Final = 0.99
MEDIAN_GOAL: Final = 0.05
ABOVE_GOAL: Final = (0.003, 0.02)


def run(
    plan: ComparePlan, out: Path, *, json_output: bool, typed: str, settings: Settings | None = None
) -> int:
    """Measure, print, and write ``predictor.json`` and the steps themselves into `out`.

    Returns:
        0 when the goals are met, 1 when one is not, otherwise the error's own.
    """

    def report() -> dict[str, Any]:
        content = json.loads((out / STEPS).read_text(encoding="utf-8"))
        learned, held_out = ([Observed.from_json(found) for found in content[part]] for part in PARTS)
        return build_report(learned, held_out, plan, typed)

    return measure_in_engine("predictor", plan, {}, out, report, print_table, json_output, settings)


def build_report(
    learned: Sequence[Observed], held_out: Sequence[Observed], plan: ComparePlan, typed: str
) -> dict[str, Any]:
    """The content of ``predictor.json``; errors are relative to what was measured."""
    found = errors(learned, held_out, QUANTILE)
    overall = found["online"]["all"]
    median, above = overall["median_error"], overall["above_bound"]
    low, high = ABOVE_GOAL
    return {
        "harli_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_folders(typed),
        "model": Path(plan.model).name,
        "trace": plan.trace.name if plan.trace else "synthetic",
        "quantile": QUANTILE,
        "learned_steps": len(learned),
        "held_out_steps": len(held_out),
        **found,
        "repeats": repeats(held_out),
        "goals": {
            "median_error": {
                "title": "median relative error",
                "value": median,
                "wanted": f"at most {MEDIAN_GOAL:.0%}",
                "met": median is not None and median <= MEDIAN_GOAL,
            },
            "above_bound": {
                "title": f"share of steps above the {QUANTILE:.0%} bound",
                "value": above,
                "wanted": f"{low:.1%} to {high:.0%}",
                "met": above is not None and low <= above <= high,
            },
        },
        "machine": describe_machine(),
    }


def print_table(report: Mapping[str, Any], console: Console) -> None:
    table = Table(
        "steps",
        "count",
        "predictor",
        "median error",
        "90% of errors below",
        "above bound",
        "bound over measured",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for way in ("online", "frozen"):
        for name, found in {"all": report[way]["all"], **report[way]["regimes"]}.items():
            cells = [
                _percent(found[key]) for key in ("median_error", "p90_error", "above_bound", "median_margin")
            ]
            table.add_row(name, f"{found['predicted']} of {found['steps']}", way, *cells)
    console.print(table)
    again = report["repeats"]
    console.print(
        f"two like decode steps in a row differ by {_percent(again['median_change'])} "
        f"(median of {again['steps']})",
        highlight=False,
    )
    for goal in report["goals"].values():
        verdict = "met" if goal["met"] else "missed"
        line = f"{goal['title']}: {_percent(goal['value'])}, wanted {goal['wanted']}: {verdict}"
        console.print(line, highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
