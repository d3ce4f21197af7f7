"""An appliance as a child process: started, awaited, watched and always stopped again.

Knows processes and the one JSON line by which ``harli_appliance.serve`` says that it is ready. The child sees
nothing of the person's own configuration: it gets its own home as working directory, and no HARLI_ variables.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import harli_appliance
from harli_appliance.errors import ApplianceUnavailable

SERVE: Sequence[str] = (sys.executable, "-m", "harli_appliance.serve")
_STOP_GRACE_S = 20.0
_TAIL_LINES = 15
_DEATH_NOTICE_S = 10.0

Result = TypeVar("Result")


class ApplianceChild:
    """A running appliance; made by `start_appliance`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self.url = ""

    async def died(self) -> ApplianceUnavailable:
        """Returns, with the reason, when the process ends on its own."""
        code = await self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.blame(f"the appliance ended unexpectedly ({how})")

    def blame(self, what: str) -> ApplianceUnavailable:
        """An error that carries the end of the log as a note."""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        error = ApplianceUnavailable(f"{what}; its log is {self._log}")
        for line in lines[-_TAIL_LINES:]:
            error.add_note(f"  | {line}")
        return error

    async def _await_ready(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it was started with a pipe
        async for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == "ready":
                    self.url = str(event["url"])
                    return
        raise await self.died()

    async def _drain(self) -> None:
        """A full pipe would block the child."""
        assert self._process.stdout is not None  # noqa: S101
        while await self._process.stdout.read(65_536):
            pass

    async def _stop(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_GRACE_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()


def child_environment(home: Path) -> dict[str, str]:
    """Of a process that keeps its data in `home` and runs this very package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HARLI_")}
    # Also where the package is not installed but found by working directory.
    package = str(Path(harli_appliance.__file__).parents[1])
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"HARLI_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}


@asynccontextmanager
async def start_appliance(
    home: Path,
    settings: Mapping[str, object],
    log: Path,
    *,
    ready_timeout_s: float,
    command: Sequence[str] = SERVE,
) -> AsyncIterator[ApplianceChild]:
    """An appliance that serves on a free port of this machine; it is stopped when the block ends.

    Args:
        home: its HARLI_HOME and working directory; must exist.
        settings: dotted names and values, passed as ``--set``.
        log: gets what it writes to stderr.
        ready_timeout_s: how long it may take to start serving.
        command: what to run.

    Raises:
        ApplianceUnavailable: it ended, or did not get ready in time; with the end of its log as notes.
    """
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            *flags,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=child_environment(home),
            cwd=home,
            start_new_session=True,  # Ctrl-C is for us; we stop the child in order
        )
    child = ApplianceChild(process, log)
    drain: asyncio.Task[None] | None = None
    try:
        try:
            await asyncio.wait_for(child._await_ready(), ready_timeout_s)
        except TimeoutError:
            raise child.blame(f"the appliance did not start within {ready_timeout_s:g} s") from None
        drain = asyncio.create_task(child._drain())
        yield child
    finally:
        await asyncio.shield(child._stop())
        if drain is not None:
            await drain


async def unless_it_dies(child: ApplianceChild, work: Coroutine[None, None, Result]) -> Result:
    """The result of `work`, or the child's end as soon as it ends."""
    running, death = asyncio.create_task(work), asyncio.create_task(child.died())
    try:
        await asyncio.wait({running, death}, return_when=asyncio.FIRST_COMPLETED)
        if running.done() and isinstance(running.exception(), ApplianceUnavailable):
            # A broken connection is often noticed before the end of the process: prefer the cause.
            await asyncio.wait({death}, timeout=_DEATH_NOTICE_S)
        if death.done():
            raise death.result()
        return running.result()
    finally:
        running.cancel()
        death.cancel()
        await asyncio.gather(running, death, return_exceptions=True)
