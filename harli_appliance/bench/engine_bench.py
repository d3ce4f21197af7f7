"""What the benchmarks that work inside an engine have in common: from flags to a report and an exit code."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from harli_appliance.bench.compare_plan import ComparePlan
from harli_appliance.bench.demo import INTERRUPTED
from harli_appliance.bench.engine_process import fetch_model, scratch_home, work_in_engine
from harli_appliance.bench.progress import Narrator, Steps, make_out, tell_failure
from harli_appliance.config import Settings, load_settings
from harli_appliance.errors import HarliError


def measure_in_engine(
    kind: str,
    plan: ComparePlan,
    extra: Mapping[str, Any],
    out: Path,
    build: Callable[[], dict[str, Any]],
    show: Callable[[Mapping[str, Any], Console], None],
    json_output: bool,
    settings: Settings | None,
) -> int:
    """Have an engine do the work `kind`, then write ``<kind>.json`` into `out` and print it.

    Args:
        extra: of the task, besides plan, model and folder; see `engine_child`.
        build: the report, with ``goals``, from what the work left in `out`.
        show: prints it for a person.

    Returns:
        0 when all goals are met, 1 when one is not, 130 when interrupted, otherwise the error's own.
    """
    errors = Console(stderr=True)
    settings = settings or load_settings()
    try:
        plan.load_trace()
        make_out(out)
        with Narrator(errors) as narrator, scratch_home(settings) as home:
            folder = fetch_model(plan.model, settings, narrator)
            task = {
                "kind": kind,
                "settings": plan.appliance_settings(folder, settings),
                "plan": plan.model_dump(mode="json"),
                "model": str(folder),
                "out": str(out.absolute()),
                **extra,
            }
            telling = Steps(narrator)
            asyncio.run(work_in_engine(task, home, out / f"{kind}.log", telling.tell))
            telling.end()
        report = build()
    except KeyboardInterrupt:
        errors.print("interrupted; the engine is stopped")
        return INTERRUPTED
    except HarliError as error:
        return tell_failure(errors, error)
    path = out / f"{kind}.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if json_output:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report, Console())
    errors.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(goal["met"] for goal in report["goals"].values()) else 1
