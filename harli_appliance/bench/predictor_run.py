"""Steps of a real engine, to learn from and to be predicted: two stretches of a trace, with and without training.

Knows the scheduler, whose predictor it replaces by one that keeps what it is told. The arithmetic
is in `predictor_errors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from harli_appliance.api.ports import AppliancePort
from harli_appliance.bench.compare_plan import ComparePlan, stretch
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.predictor_errors import PARTS, STEPS, UNITS, Observed, Recorder
from harli_appliance.bench.session import Session, Tell
from harli_appliance.bench.system import InProcess
from harli_appliance.bench.verdict import REFERENCE
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.training.trainer import Trainer

POLICIES: Final = (REFERENCE, "naive", "adaptive")
"""Alone, beside training, and both by turns as in service."""
RATE: Final = 2.0
"""In answers per second of serving one by one, so that batches of several requests occur."""


async def record_steps(
    appliance: AppliancePort, scheduler: Scheduler, trainer: Trainer, task: Mapping[str, Any], tell: Tell
) -> None:
    """Write ``steps.json``: the observed steps of each of `PARTS`, which lie apart in the trace; and as `UNITS`
    how many units of each kind training ran meanwhile, and their mean time.

    Args:
        task: ``plan`` (a `ComparePlan`), ``model`` and ``out``.
    """
    plan = ComparePlan.model_validate(task["plan"])
    trace = plan.load_trace()
    recorder = Recorder()
    scheduler.predictor = recorder
    session = Session(
        InProcess(appliance),
        appliance.models()[0].id,
        Prompts(Path(task["model"])),
        sequence_tokens=plan.sequence_tokens,
        ttft_ms=plan.ttft_ms,
        seed=plan.seed,
    )
    await session.open()
    await session.use(REFERENCE)
    alone = await session.one_by_one(trace, plan.light_requests, tell)
    rate = RATE * len(alone) / sum(record.ended_at - record.sent_at for record in alone)
    await session.use("train_only")
    await session.training.start()
    found: dict[str, list[Observed]] = {}
    for part, name in enumerate(PARTS):
        recorder.seen = []
        for number, policy in enumerate(POLICIES):
            tell(f"Steps: {name}", number / len(POLICIES), policy)
            await session.replay(
                stretch(trace, plan, rate, part), policy, lead_s=plan.lead_s, grace_s=plan.grace_s
            )
        tell(f"Steps: {name}", 1.0, f"{len(recorder.seen)} steps")
        found[name] = recorder.seen
    content: dict[str, Any] = {
        name: [observed.as_json() for observed in steps] for name, steps in found.items()
    }
    content[UNITS] = {
        kind: {"count": times.count, "mean_ms": times.total_ms / times.count}
        for kind, times in trainer.units.times.items()
    }
    (Path(task["out"]) / STEPS).write_text(json.dumps(content), encoding="utf-8")
