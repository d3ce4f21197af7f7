"""`harli bench`: measurements of this machine. Knows the flags; what happens is in `harli_appliance.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.cli.connect import Json

app = typer.Typer(no_args_is_help=True, help="Measure what the appliance costs and brings on this machine.")


@app.callback()
def bench() -> None:
    """Keep `runtime` a command of its own."""


@app.command("runtime")
def runtime(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where runtime.json and the logs are written.")
    ] = Path("bench-report"),
    json: Json = False,
) -> None:
    """Overhead of a tick, CPU attention, prefix cache and adapter loading, against their goals."""
    from harli_appliance.bench.runtime import run

    raise typer.Exit(run(out, json))
