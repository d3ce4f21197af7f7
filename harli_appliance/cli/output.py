"""How commands print: results to stdout, messages to stderr, JSON when asked.

Knows rich's tables, but loads rich only for a table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime

import typer

UNLIMITED_WIDTH = 10_000
"""Columns of a table that goes into a pipe: nothing is cut off there."""


def complain(message: str) -> None:
    """One line on stderr."""
    typer.echo(f"harli: {' '.join(message.split())}", err=True)


def note(message: str) -> None:
    """What is going on, on stderr."""
    typer.echo(message, err=True)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else UNLIMITED_WIDTH, highlight=False).print(table)


def steps(made: int, in_all: int) -> str:
    """Optimizer steps; a job that has not begun does not know yet how many it has."""
    return f"{made}/{in_all}" if in_all else "-"


def state(status: str, waits_for: str | None) -> str:
    """A job's status, and the model that has to be served before it goes on."""
    return f"{status}, waits for {waits_for}" if waits_for else status


def when(epoch: int | None) -> str:
    """A time of day in the reader's zone."""
    if epoch is None:
        return "-"
    return datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
