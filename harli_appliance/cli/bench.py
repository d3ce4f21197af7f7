"""`harli bench`: measurements of this machine. Knows the flags; what happens is in `harli_appliance.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.cli.connect import Json

app = typer.Typer(no_args_is_help=True, help="Measure what the appliance costs and brings on this machine.")


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


@app.command("decide")
def decide(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where decide.json is written.")] = Path(
        "bench-report"
    ),
    json: Json = False,
) -> None:
    """How long the scheduler takes to decide, for every policy."""
    from harli_appliance.bench.decide import run

    raise typer.Exit(run(out, json))
