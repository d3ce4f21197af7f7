"""`harli doctor`: what is missing on this machine, and what to do about it. Prints what `checks` finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from harli_appliance.cli.connect import Json, Url
from harli_appliance.cli.output import note, print_json

if TYPE_CHECKING:
    from harli_appliance.cli.check import Check

MARKS = {
    "ok": ("ok  ", typer.colors.GREEN),
    "warn": ("warn", typer.colors.YELLOW),
    "fail": ("FAIL", typer.colors.RED),
}


def doctor(json: Json = False, url: Url = None) -> None:
    """Check this machine and its installation; exit 1 when something must be mended."""
    from harli_appliance.cli.checks import all_checks

    note("looking; loading SGLang takes some seconds")
    checks = list(all_checks(url))
    if json:
        print_json({"ok": not _failed(checks), "checks": [check.as_json() for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark, colour = MARKS[check.level]
            advice = f": {check.advice}" if check.advice else ""
            typer.echo(f"{typer.style(mark, fg=colour)}  {check.name:<{width}}  {check.found}{advice}")
    raise typer.Exit(1 if _failed(checks) else 0)


def _failed(checks: list[Check]) -> bool:
    return any(check.level == "fail" for check in checks)
