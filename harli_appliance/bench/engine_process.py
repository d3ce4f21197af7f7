"""Work done inside an engine's own process, seen from outside: started, followed, ended.

Knows processes and what `engine_child` tells. Does not know the work.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from harli_appliance.bench.child import child_environment
from harli_appliance.bench.progress import Narrator
from harli_appliance.bench.session import Tell
from harli_appliance.config import Settings
from harli_appliance.errors import ApplianceUnavailable, ConfigError, HarliError
from harli_appliance.models.catalog import resolve_model

ENGINE: Sequence[str] = (sys.executable, "-m", "harli_appliance.bench.engine_child")
_TAIL_LINES: Final = 15


@contextmanager
def scratch_home(settings: Settings) -> Iterator[Path]:
    """A HARLI_HOME below the person's own, away from their jobs; gone after the block.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        (settings.home / "bench").mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix="run-", dir=settings.home / "bench"))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; choose another HARLI_HOME") from error
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def fetch_model(name: str, settings: Settings, narrator: Narrator) -> Path:
    """The model's folder; it is fetched first if need be."""
    with narrator.step(f"Model {name}") as step:
        return resolve_model(name, settings, lambda stage, share: step.update(share, stage))


async def work_in_engine(task: Mapping[str, Any], home: Path, log: Path, tell: Tell) -> None:
    """Start an engine, have it do a task, and wait for its end.

    Args:
        task: see `engine_child`.
        home: its HARLI_HOME and working directory; must exist.
        log: gets what it writes to stderr.

    Raises:
        HarliError: what went wrong with the work, with its exit code.
        ApplianceUnavailable: the process ended on its own; with the end of its log as notes.
    """
    work = home / "work.json"
    work.write_text(json.dumps(task), encoding="utf-8")
    with log.open("wb") as messages:
        process = await asyncio.create_subprocess_exec(
            *ENGINE,
            str(work),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=messages,
            env=child_environment(home),
            cwd=home,
            start_new_session=True,  # Ctrl-C is for us; we end the child
        )
    refused: HarliError | None = None
    try:
        assert process.stdout is not None  # noqa: S101 - it was started with a pipe
        async for line in process.stdout:
            event = json.loads(line)
            if "error" in event:
                refused = refusal_of(event)
            else:
                tell(event["step"], event["share"], event["note"])
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()  # what it measured is kept already
            await process.wait()
    if refused is not None:
        raise refused
    if code != 0:
        raise _blame(code, log)


def _blame(code: int, log: Path) -> ApplianceUnavailable:
    failure = ApplianceUnavailable(f"the engine ended unexpectedly (exit code {code}); its log is {log}")
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]:
        failure.add_note(f"  | {text}")
    return failure


def refusal_of(event: Mapping[str, Any]) -> HarliError:
    """The child's error, as one with the same exit code."""
    kinds = (kind for kind in HarliError.__subclasses__() if kind.exit_code == event["exit_code"])
    return next(kinds, HarliError)(event["error"])
