"""``harli demo``: the main job in one command, on this machine, with a report of what it showed.

Puts the pieces together: the model, an appliance of its own, the run, the report. Leaves nothing behind but
the model and the report, also when it is interrupted or the appliance dies.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from harli_appliance.bench.child import SERVE, start_appliance, unless_it_dies
from harli_appliance.bench.demo_report import build_page, build_report, print_summary
from harli_appliance.bench.demo_run import DemoPlan, DemoRun, Measurements
from harli_appliance.bench.machine import describe_machine
from harli_appliance.bench.progress import Narrator, tell_failure
from harli_appliance.bench.report import write_report
from harli_appliance.client import HarliClient
from harli_appliance.config import Settings, load_settings
from harli_appliance.errors import ConfigError, HarliError
from harli_appliance.models.catalog import resolve_model

INTERRUPTED = 130
_PLAIN_WIDTH = 120


def run(
    out: Path,
    json_output: bool,
    *,
    plan: DemoPlan | None = None,
    settings: Settings | None = None,
    command: Sequence[str] = SERVE,
) -> int:
    """Run the demo and write ``report.json`` and ``report.html`` into `out`.

    Args:
        out: made if need be; also gets the appliance's log.
        json_output: print the report as JSON instead of a summary.
        plan: how long and how much.
        settings: only the home is used: the model is kept there, and the demo's own appliance lives in a
            temporary folder below it, away from the person's jobs.
        command: what starts an appliance.

    Returns:
        The exit code: 0 when all goals are met, 1 when one is not, 130 when interrupted, otherwise the
        error's own. Everything that is not the result goes to stderr.
    """
    errors = Console(stderr=True)
    previous = signal.signal(signal.SIGTERM, as_interrupt)
    try:
        report = _run(out.absolute(), plan or DemoPlan(), settings or load_settings(), command, errors)
    except KeyboardInterrupt:
        errors.print("interrupted; the appliance is stopped")
        return INTERRUPTED
    except HarliError as error:
        return tell_failure(errors, error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if json_output:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        console = Console()
        print_summary(report, console if console.is_terminal else Console(width=_PLAIN_WIDTH))
    errors.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    missed = [goal for goal in report["goals"].values() if not goal["met"]]
    for goal in missed:
        line = f"goal missed: {goal['title']}: {goal['value']}, wanted: {goal['target']}"
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if missed else 0


def as_interrupt(number: int, frame: FrameType | None) -> None:
    """A polite kill is handled as Ctrl-C is, so that the appliance is stopped too. A shell has its commands in the
    background ignore SIGINT; they must end all the same."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _run(
    out: Path, plan: DemoPlan, settings: Settings, command: Sequence[str], errors: Console
) -> dict[str, Any]:
    started = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (settings.home / "demo").mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix="run-", dir=settings.home / "demo"))
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; choose another --out or HARLI_HOME"
        ) from error
    try:
        with Narrator(errors) as narrator:
            model = _fetch(plan.model, settings, narrator)
            seen = asyncio.run(_measure(model, home, out / "appliance.log", plan, command, narrator))
            with narrator.step("Writing the report"):
                report = build_report(seen, describe_machine(), time.monotonic() - started)
                write_report(out, "report", report, build_page(seen, report))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return report


def _fetch(name: str, settings: Settings, narrator: Narrator) -> Path:
    with narrator.step(f"Model {name}") as step:

        def tell(stage: str, share: float) -> None:
            step.update(share, stage)

        folder = resolve_model(name, settings, tell)
        step.update(1.0, "ready")
    return folder


async def _measure(
    model: Path, home: Path, log: Path, plan: DemoPlan, command: Sequence[str], narrator: Narrator
) -> Measurements:
    flags = {
        "server.host": "127.0.0.1",
        "server.port": 0,
        "model.path": model,
        "model.served_name": model.name,
        "model.context_length": plan.context_length,
        "memory.pool_slots": plan.pool_slots,
    }
    async with AsyncExitStack() as stack:
        with narrator.step("Starting the appliance") as step:
            child = await stack.enter_async_context(
                start_appliance(home, flags, log, ready_timeout_s=plan.ready_timeout_s, command=command)
            )
            client = await stack.enter_async_context(HarliClient(child.url))
            await client.wait_ready(plan.ready_timeout_s)
            step.update(note=child.url)
        return await unless_it_dies(child, DemoRun(client, model.name, plan, narrator).measure())
