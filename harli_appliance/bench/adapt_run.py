"""What a client sees when everything suddenly takes longer, for all that the predictor has learned.

Knows the runtime, whose steps it makes slower at a moment in the middle. What that amounts to is
in `adapt`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from harli_appliance.api.ports import AppliancePort
from harli_appliance.bench.compare_plan import ComparePlan, stretch
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.replay import Record
from harli_appliance.bench.session import Session, Tell, p99_tpot_ms
from harli_appliance.bench.system import InProcess
from harli_appliance.bench.verdict import OURS, REFERENCE
from harli_appliance.bench.violation import TOKENS
from harli_appliance.runtime.protocol import Runtime, StepOutcome, StepPlan

RATE: Final = 0.5
"""In answers per second of serving one by one: twice the cost must leave a machine that can keep the promise."""


class Slowdown:
    """Makes a runtime's steps take `factor` times as long, from when it is set."""

    def __init__(self, runtime: Runtime) -> None:
        self.factor = 1.0
        self._execute = runtime.execute
        runtime.execute = self._slowed  # type: ignore[method-assign]

    def _slowed(self, plan: StepPlan) -> StepOutcome:
        outcome = self._execute(plan)
        time.sleep((self.factor - 1.0) * outcome.seconds)
        return replace(outcome, seconds=self.factor * outcome.seconds)


async def record_tokens(
    appliance: AppliancePort, runtime: Runtime, task: Mapping[str, Any], tell: Tell
) -> None:
    """Write ``tokens.json``: when each token came, the promise, and when everything became slower.

    Args:
        task: ``plan`` (a `ComparePlan` of one SLO), ``factor``, ``model`` and ``out``.
    """
    plan = ComparePlan.model_validate(task["plan"])
    trace = plan.load_trace()
    slowdown = Slowdown(runtime)
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
    tpot_ms = plan.slos[0].resolve(p99_tpot_ms(alone))
    rate = RATE * len(alone) / sum(record.ended_at - record.sent_at for record in alone)
    await session.use("train_only")
    await session.training.start()
    tell("Learning", None, "serving and training together")
    waits = {"lead_s": plan.lead_s, "grace_s": plan.grace_s}
    await session.replay(stretch(trace, plan, rate, 0), "naive", **waits)
    tell("Requests", None, f"{task['factor']:g} times slower after {plan.length_s / 2:.0f} s")
    changed: list[float] = []

    async def change() -> None:
        await asyncio.sleep(plan.length_s / 2)
        slowdown.factor = task["factor"]
        changed.append(time.time())

    changing = asyncio.create_task(change())
    try:
        seen = await session.replay(stretch(trace, plan, rate, 1), OURS, tpot_ms, **waits)
        await changing
    finally:
        changing.cancel()
    content = {
        "slo_tpot_ms": tpot_ms,
        "factor": task["factor"],
        "changed_at": changed[0],
        "ended_at": seen.start + plan.length_s,
        "modes": [[sample.t, sample.mode] for sample in seen.samples],
        "answers": [_arrivals(record) for _, record in seen.answers if record.ttft_s is not None],
    }
    (Path(task["out"]) / TOKENS).write_text(json.dumps(content), encoding="utf-8")


def _arrivals(record: Record) -> list[float]:
    """When each piece of an answer came, seconds since the epoch."""
    at = record.sent_at + (record.ttft_s or 0.0)
    arrivals = [at]
    for gap in record.itl_s:
        at += gap
        arrivals.append(at)
    return arrivals
