"""`harli data`: look at a training file before it is uploaded. Needs no appliance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.cli.output import note, print_json

app = typer.Typer(help="Training files: check them before they are uploaded.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Training files: check them before they are uploaded."""


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A training file: one JSON object a line.")],
    model: Annotated[
        str | None,
        typer.Option(help="Count tokens as this model does; the configured one when it is installed."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a training file; exit 1 when it would be refused."""
    from harli_appliance.cli.lengths import installed_lengths
    from harli_appliance.config import load_settings
    from harli_appliance.training.dataset import MIB, check_dataset
    from harli_appliance.training.turns import TokenCounter

    settings = load_settings()
    lengths = installed_lengths(settings, model)
    report = check_dataset(
        file,
        count_tokens=TokenCounter(lengths) if lengths is not None else None,
        context_length=lengths.context if lengths is not None else None,
        max_file_bytes=settings.server.max_upload_mib * MIB,
        max_findings=sys.maxsize,
    )
    if json:
        print_json(report.as_json())
    else:
        for kind, findings in (("error", report.errors), ("warning", report.warnings)):
            for finding in findings:
                typer.echo(f"{file}:{finding.line}: {kind}: {finding.message} [{finding.code}]")
        verdict = "ok" if report.ok else "refused"
        typer.echo(
            f"{file}: {verdict}, {_count(report.examples, 'good example')}, "
            f"{_count(len(report.errors), 'error')}, {_count(len(report.warnings), 'warning')}"
        )
        if lengths is None:
            note("lengths in tokens were not checked: no model is installed; name one with --model")
    raise typer.Exit(0 if report.ok else 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
