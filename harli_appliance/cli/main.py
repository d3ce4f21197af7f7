"""The command `harli`: which commands exist, and how any failure becomes one line and an exit code.

Imports nothing heavy: a command loads what it needs when it runs, so that ``harli --help`` is immediate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from harli_appliance import __version__
from harli_appliance.cli import bench, chat, data, demo, doctor, jobs, models, plan, serve, status
from harli_appliance.cli.output import complain
from harli_appliance.errors import HarliError

EPILOG = (
    "Exit codes: 0 ok, 1 failed, 2 usage, 3 appliance unreachable, 4 job failed, 130 interrupted. "
    "HARLI_URL and HARLI_API_KEY say where the appliance is and how to get in."
)

app = typer.Typer(
    name="harli",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"harli {__version__}")
        raise typer.Exit


@app.callback()
def harli(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve an LLM and finetune LoRA adapters of it on one machine, inside the latency you promised."""


app.command("serve")(serve.serve)
app.command("run")(chat.run)
app.command("ps")(status.ps)
app.add_typer(jobs.app, name="jobs")
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.command("status")(status.status)
app.command("top")(status.top)
app.command("demo")(demo.demo)
app.add_typer(bench.app, name="bench")
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    try:
        app(args=list(arguments), prog_name="harli")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    except HarliError as error:
        complain(error.message)
        return error.exit_code
    return 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
