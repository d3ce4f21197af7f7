"""The process of a benchmark that works on the engine itself: an appliance without HTTP, asked from inside.

``python -m harli_appliance.bench.engine_child WORK.json`` reads what to do: ``kind`` (`WORK`), the appliance's
``settings``, the ``model`` folder and the folder for what is found, ``out``. It tells on stdout how it goes, one
line of JSON each: ``{"step", "share", "note"}`` while it runs, ``{"error", "exit_code"}`` when it cannot go on.
Everything else goes to stderr. Like the process of ``harli serve`` it may build an appliance.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harli_appliance.errors import HarliError

if TYPE_CHECKING:
    from harli_appliance.appliance import Appliance

Task = Mapping[str, Any]


def tell(title: str, share: float | None, note: str) -> None:
    _say({"step": title, "share": share, "note": note})


def _say(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), file=_STDOUT, flush=True)


async def _work(task: Task) -> None:
    # Stand-ins first: transformers and SGLang trip over what is missing without a GPU.
    from harli_appliance.runtime import cpu_stand_ins

    cpu_stand_ins.install()
    from harli_appliance.appliance import Appliance
    from harli_appliance.config import load_settings

    tell("Starting the engine", None, "")
    appliance = await Appliance.open(load_settings(**task["settings"]))
    try:
        await appliance.start()
        tell("Starting the engine", 1.0, "ready")
        await WORK[task["kind"]](appliance, task)
    finally:
        await appliance.close()


async def _compare(appliance: Appliance, task: Task) -> None:
    """The runs of a comparison; its plan is in the store."""
    from harli_appliance.bench.compare_run import CompareRun
    from harli_appliance.bench.compare_store import CompareStore
    from harli_appliance.bench.exact_prompts import Prompts
    from harli_appliance.bench.system import InProcess

    store = CompareStore(Path(task["out"]))
    plan = store.plan()
    model = appliance.models()[0].id
    prompts = Prompts(Path(task["model"]))
    await CompareRun(InProcess(appliance), model, plan, plan.load_trace(), prompts, store, tell).measure()


async def _predictor(appliance: Appliance, task: Task) -> None:
    """Steps to learn from and steps to be predicted, and units of training, kept in ``steps.json``."""
    from harli_appliance.bench.predictor_run import record_steps

    await record_steps(appliance, appliance.scheduler, appliance.trainer, task, tell)


async def _adapt(appliance: Appliance, task: Task) -> None:
    """Requests before and after everything takes twice as long, kept in ``tokens.json``."""
    from harli_appliance.bench.adapt_run import record_tokens

    await record_tokens(appliance, appliance.runtime, task, tell)


async def _memory(appliance: Appliance, task: Task) -> None:
    """How fast slots change hands, kept in ``found.json``."""
    from harli_appliance.bench.memory_run import measure_memory

    await measure_memory(appliance, appliance.pool, appliance.slots, appliance.inference, task, tell)


WORK: Mapping[str, Callable[[Appliance, Task], Awaitable[None]]] = {
    "compare": _compare,
    "predictor": _predictor,
    "adapt": _adapt,
    "memory": _memory,
}


def main(work: Path) -> int:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    try:
        asyncio.run(_work(json.loads(work.read_text(encoding="utf-8"))))
    except HarliError as error:
        _say({"error": error.message, "exit_code": error.exit_code})
        return error.exit_code
    return 0


if __name__ == "__main__":
    _STDOUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print, C and CUDA ones past Python
    sys.exit(main(Path(sys.argv[1])))
