"""`harli demo`: the whole story in one command. Knows the flags; what happens is in `bench.demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.cli.connect import Json


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where report.json and report.html are written.")
    ] = Path("demo-report"),
    json: Json = False,
) -> None:
    """Serve, finetune at the same time, ask the new adapter, and write a report with pictures."""
    from harli_appliance.bench.demo import run

    raise typer.Exit(run(out, json))
