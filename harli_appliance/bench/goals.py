"""Goals of a report: which of its numbers, what each should be, and how a report is told. Knows no measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harli_appliance.bench.progress import tell_failure
from harli_appliance.errors import HarliError


@dataclass(frozen=True, slots=True)
class Goal:
    """A number of the report and what it should be."""

    key: str
    title: str
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


def judged(report: Mapping[str, Any], goals: Sequence[Goal]) -> dict[str, dict[str, Any]]:
    """Each goal by its key, with what was measured and whether that meets it."""
    return {
        goal.key: {
            "title": goal.title,
            "value": (value := _at(report, goal.key)),
            "wanted": goal.wanted,
            "met": goal.met(value),
        }
        for goal in goals
    }


def told(
    measure: Callable[[Console], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], Table],
    path: Path,
    json_output: bool,
) -> int:
    """Measure, and print the report that `measure` wrote to `path`, or why there is none.

    Args:
        measure: gets the console for messages; the report has ``goals`` as `judged` gives them.

    Returns:
        0 when all goals are met, 1 when one is not, otherwise the error's own exit code.
    """
    errors = Console(stderr=True)
    try:
        report = measure(errors)
    except HarliError as error:
        return tell_failure(errors, error)
    if json_output:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        Console().print(table(report))
    errors.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(goal["met"] for goal in report["goals"].values()) else 1


def rounded(tree: Any) -> Any:
    """A report with its numbers to four places."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return round(tree, 4) if isinstance(tree, float) else tree


def _at(report: Mapping[str, Any], key: str) -> float:
    found: Any = report
    for part in key.split("."):
        found = found[part]
    return float(found)
