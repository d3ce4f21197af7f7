"""What the check of a data set found: faults with their lines, capped so that a long list stays readable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from harli_appliance.schema import DataFormat


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault. `line` counts from 1; a fault of the whole file is told at the line where it shows."""

    line: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. `examples` counts the lines that are good examples, all of `format`."""

    examples: int
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    format: DataFormat = "chat"

    @property
    def ok(self) -> bool:
        return not self.errors

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "format": self.format,
            "examples": self.examples,
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
        }


class Findings:
    """Collects findings; beyond `limit` it only counts them, and says so in one last finding.

    Args:
        noun: what is collected, in the plural, e.g. ``errors``.
    """

    def __init__(self, noun: str, limit: int) -> None:
        self._noun = noun
        self._limit = limit
        self._kept: list[Finding] = []
        self._omitted = 0
        self._first_omitted_line = 0

    def add(self, line: int, code: str, message: str) -> None:
        if len(self._kept) < self._limit:
            self._kept.append(Finding(line, code, message))
            return
        self._omitted += 1
        if self._omitted == 1:
            self._first_omitted_line = line

    def closed(self, summaries: Iterable[Finding] = ()) -> tuple[Finding, ...]:
        """Everything kept, then `summaries`, then how many more there are."""
        found = [*self._kept, *summaries]
        if self._omitted:
            noun = self._noun if self._omitted > 1 else self._noun.removesuffix("s")
            message = f"and {self._omitted} more {noun}, from this line on; mend those above first"
            found.append(Finding(self._first_omitted_line, f"more_{self._noun}", message))
        return tuple(found)
