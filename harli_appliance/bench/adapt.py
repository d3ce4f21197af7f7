"""``harli bench adapt``: everything takes twice as long from one moment on; how long is the promise broken?

The tokens come from an engine in a process of its own (`adapt_run`). Knows the goal, prints the result and writes
``adapt.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from harli_appliance import __version__
from harli_appliance.bench.compare_plan import ComparePlan, without_folders
from harli_appliance.bench.engine_bench import measure_in_engine
from harli_appliance.bench.machine import describe_machine
from harli_appliance.bench.violation import TOKENS, violation
from harli_appliance.config import Settings

GOAL_S: Final = 2.0
FACTOR: Final = 2.0


def run(
    plan: ComparePlan, out: Path, *, json_output: bool, typed: str, settings: Settings | None = None
) -> int:
    """Measure, print, and write ``adapt.json`` into `out`.

    Returns:
        0 when the goal is met, 1 when it is not, otherwise the error's own.
    """

    def report() -> dict[str, Any]:
        found = json.loads((out / TOKENS).read_text(encoding="utf-8"))
        return build_report(found, plan, typed)

    extra = {"factor": FACTOR}
    return measure_in_engine("adapt", plan, extra, out, report, print_result, json_output, settings)


def build_report(found: Mapping[str, Any], plan: ComparePlan, typed: str) -> dict[str, Any]:
    """The content of ``adapt.json``; times in seconds after the change."""
    tpot_s = found["slo_tpot_ms"] / 1e3
    changed = found["changed_at"]
    late = violation(found["answers"], tpot_s, changed)
    before = violation(([at for at in answer if at < changed] for answer in found["answers"]), tpot_s, 0.0)
    return {
        "harli_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_folders(typed),
        "model": Path(plan.model).name,
        "trace": plan.trace.name if plan.trace else "synthetic",
        "slo": {"label": plan.slos[0].label, "tpot_ms": round(found["slo_tpot_ms"], 3)},
        "factor": found["factor"],
        "observed_s": round(found["ended_at"] - changed, 3),
        "answers": len(found["answers"]),
        "violated_before_s": round(before.total_s, 3),
        "violated_s": round(late.total_s, 3),
        "last_violation_s": round(late.last_s, 3),
        "modes_before": _shares(mode for at, mode in found["modes"] if at < changed),
        "modes_after": _shares(mode for at, mode in found["modes"] if at >= changed),
        "goals": {
            "violated_s": {
                "title": "time for which an answer was behind its schedule after the change",
                "value": round(late.total_s, 3),
                "wanted": f"at most {GOAL_S:g} s",
                "met": late.total_s <= GOAL_S,
            }
        },
        "machine": describe_machine(),
    }


def _shares(modes: Iterable[str]) -> dict[str, float]:
    """How often the engine was in each mode when it noted its state."""
    counted = Counter(modes)
    return {mode: round(count / counted.total(), 4) for mode, count in counted.most_common()}


def print_result(report: Mapping[str, Any], console: Console) -> None:
    goal = report["goals"]["violated_s"]
    for line in (
        f"promised {report['slo']['tpot_ms']:.0f} ms per token ({report['slo']['label']}); steps take "
        f"{report['factor']:g} times as long from one moment on, watched for {report['observed_s']:.0f} s",
        f"behind schedule for {report['violated_before_s']:.2f} s before and {report['violated_s']:.2f} s after, "
        f"the last time {report['last_violation_s']:.2f} s after the change",
        f"{goal['title']}: wanted {goal['wanted']}: {'met' if goal['met'] else 'missed'}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
