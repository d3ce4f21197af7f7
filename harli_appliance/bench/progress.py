"""What long runs share: telling on stderr what they do, live or in lines, why they failed, and their folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from harli_appliance.errors import ConfigError, HarliError

_PLAIN_EVERY_S = 15.0


def tell_failure(errors: Console, error: HarliError) -> int:
    """Say why a run ended, with the error's notes; returns its exit code."""
    for line in (f"error: {error.message}", *getattr(error, "__notes__", ())):
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
    return error.exit_code


class Step:
    """One thing being done; `update` it as often as you like."""

    def __init__(self, narrator: Narrator, title: str) -> None:
        self._narrator = narrator
        self._title = title
        self._started = self._last_line = time.monotonic()
        self._note = ""
        self._bar: TaskID | None = None
        if narrator.bars is not None:
            self._bar = narrator.bars.add_task(title, total=None, note="")
        else:
            self._print(f"{title} ...")

    def update(self, share: float | None = None, note: str | None = None) -> None:
        """`share` is how much is done, 0 to 1; `note` is shown beside it."""
        self._note = self._note if note is None else note
        if self._narrator.bars is not None and self._bar is not None:
            total = None if share is None else 1.0
            self._narrator.bars.update(self._bar, completed=share, total=total, note=self._note)
        elif time.monotonic() - self._last_line > _PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            done = "" if share is None else f" {share:.0%}"
            self._print(f"  {self._title}{done} {self._note}".rstrip())

    def end(self) -> None:
        if self._narrator.bars is not None and self._bar is not None:
            self._narrator.bars.update(self._bar, completed=1.0, total=1.0, note=self._note)
            self._narrator.bars.stop_task(self._bar)
        else:
            took = time.monotonic() - self._started
            self._print(f"  done in {took:.0f} s{': ' if self._note else ''}{self._note}")

    def _print(self, line: str) -> None:
        self._narrator.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Narrator:
    """Use it with ``with``; the bars stay on screen after the end, as a record of what was done."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bars: Progress | None = None
        if self.console.is_terminal:
            self.bars = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
            )

    def __enter__(self) -> Narrator:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """A step that is shown as done when the block ends without an error."""
        step = Step(self, title)
        yield step
        step.end()


class Steps:
    """Turns what is told, here or by another process, into steps: a new title ends the step before."""

    def __init__(self, narrator: Narrator) -> None:
        self._narrator = narrator
        self._title = ""
        self._step: Step | None = None

    def tell(self, title: str, share: float | None, note: str) -> None:
        if title != self._title:
            self.end()
            self._title, self._step = title, Step(self._narrator, title)
        if self._step is not None:
            self._step.update(share, note)

    def end(self) -> None:
        if self._step is not None:
            self._step.end()
            self._step = None


def make_out(folder: Path) -> None:
    """Make the folder that results are written to.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; choose another --out") from error
