"""``harli bench run``: policies side by side on one machine, on the same requests, with a report.

Puts the pieces together: the model, the folder, an appliance of its own (in a child process, with or without
HTTP), the runs, the report. An interrupted comparison keeps what it measured.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from rich.console import Console

from harli_appliance.bench.child import SERVE, start_appliance, unless_it_dies
from harli_appliance.bench.compare_plan import ComparePlan
from harli_appliance.bench.compare_report import print_summary, write_results
from harli_appliance.bench.compare_run import CompareRun
from harli_appliance.bench.compare_store import CompareStore
from harli_appliance.bench.demo import INTERRUPTED, as_interrupt
from harli_appliance.bench.engine_process import fetch_model, scratch_home, work_in_engine
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.progress import Narrator, Steps, tell_failure
from harli_appliance.bench.session import Tell
from harli_appliance.client import HarliClient
from harli_appliance.config import Settings, load_settings
from harli_appliance.errors import HarliError

READY_TIMEOUT_S: Final = 300.0


def run(
    plan: ComparePlan,
    out: Path,
    *,
    resume: bool,
    json_output: bool,
    typed: str,
    settings: Settings | None = None,
    serve: Sequence[str] = SERVE,
) -> int:
    """Compare, print, and write ``report.json``, ``report.html`` and CSV files into `out`.

    Args:
        out: made if need be; also keeps every run as soon as it is done.
        resume: go on with the comparison in `out`.
        typed: the command, for the report.
        settings: only the home is used, which keeps the model.
        serve: what starts an appliance with HTTP.

    Returns:
        0 when all goals are met, 1 when one is not, 130 when interrupted, otherwise the error's own.
    """
    errors = Console(stderr=True)
    previous = signal.signal(signal.SIGTERM, as_interrupt)
    out = out.absolute()
    store = CompareStore(out)
    try:
        trace = plan.load_trace()
        store.begin(plan, resume=resume)
        with Narrator(errors) as narrator:
            _measure(plan, store, settings or load_settings(), narrator, serve)
            with narrator.step("Writing the report"):
                report = write_results(store, plan, trace, typed)
    except KeyboardInterrupt:
        errors.print(f"interrupted; go on with: {typed} --resume", markup=False, soft_wrap=True)
        return INTERRUPTED
    except HarliError as error:
        return tell_failure(errors, error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if json_output:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_summary(report)
    errors.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(goal["met"] for goal in report["goals"].values()) else 1


def _measure(
    plan: ComparePlan, store: CompareStore, settings: Settings, narrator: Narrator, serve: Sequence[str]
) -> None:
    """Make the runs that are missing."""
    basis = store.basis()
    missing = sum(not store.has(run) for run in plan.runs(basis.kept if basis is not None else None))
    if basis is not None and not missing:
        return
    together_s = missing * plan.length_s
    narrator.console.print(
        f"{missing} runs of {plan.length_s:.0f} s: at least "
        + (f"{together_s / 60:.0f} minutes" if together_s >= 120 else f"{together_s:.0f} s")
        + ("" if basis else ", after some minutes in which it is found what serving alone can take"),
        highlight=False,
        soft_wrap=True,
    )
    folder = fetch_model(plan.model, settings, narrator)
    telling = Steps(narrator)
    with scratch_home(settings) as home:
        if plan.replay == "engine":
            task = {
                "kind": "compare",
                "settings": plan.appliance_settings(folder, settings),
                "model": str(folder),
                "out": str(store.folder),
            }
            asyncio.run(work_in_engine(task, home, store.folder / "engine.log", telling.tell))
        else:
            asked = plan.appliance_settings(folder, settings)
            asyncio.run(_over_http(plan, store, folder, asked, home, telling.tell, serve))
    telling.end()


async def _over_http(
    plan: ComparePlan,
    store: CompareStore,
    folder: Path,
    asked: Mapping[str, Mapping[str, str | int]],
    home: Path,
    tell: Tell,
    serve: Sequence[str],
) -> None:
    """The appliance as ``harli serve`` runs it, asked by this process."""
    flags: dict[str, object] = {"server.host": "127.0.0.1", "server.port": 0}
    for section, values in asked.items():
        flags |= {f"{section}.{name}": value for name, value in values.items()}
    log = store.folder / "appliance.log"
    async with AsyncExitStack() as stack:
        tell("Starting the appliance", None, "")
        child = await stack.enter_async_context(
            start_appliance(home, flags, log, ready_timeout_s=READY_TIMEOUT_S, command=serve)
        )
        client = await stack.enter_async_context(HarliClient(child.url))
        await client.wait_ready(READY_TIMEOUT_S)
        tell("Starting the appliance", 1.0, child.url)
        work = CompareRun(
            client, folder.name, plan, plan.load_trace(), Prompts(folder), store, tell
        ).measure()
        await unless_it_dies(child, work)
