"""``harli bench decide``: how long one decision takes, for every policy, with a predictor that knows a lot.

The predictor is taught made-up steps until its windows are full, which is when a decision costs most; how right it
is does not matter here. Imports neither torch nor SGLang.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from harli_appliance import __version__
from harli_appliance.bench.machine import describe_machine
from harli_appliance.scheduling.names import POLICY_NAMES
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.types import Outlook, Step

GOAL_US = 100.0
DECISIONS = 20_000
"""Of each policy; so many that 200 of them are above the 99th percentile."""
TAUGHT = 4_000
TPOT_MS = 100.0
READY = Outlook(ready=True, unit_ms=20.0, micro_batch_units=240)


def run(out: Path, as_json: bool) -> int:
    """Measure, print and write ``decide.json`` into `out`.

    Returns:
        The exit code: 1 when a policy misses the goal.
    """
    report: dict[str, Any] = {
        "version": __version__,
        "machine": describe_machine(),
        "goal_p99_us": GOAL_US,
        "decisions": DECISIONS,
        "policies": {name: measure(name) for name in POLICY_NAMES},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "decide.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        Console().print(_table(report))
    return int(any(found["p99_us"] > GOAL_US for found in report["policies"].values()))


def measure(policy: str) -> dict[str, float]:
    """Microseconds of `Scheduler.decide`: median, 99th percentile and slowest."""
    rng = random.Random(7)
    scheduler = Scheduler(_taught(rng), policy)
    steps = [(_step(rng), rng.uniform(-50.0, 1000.0)) for _ in range(DECISIONS)]
    took = []
    for step, slack in steps:
        started = time.perf_counter_ns()
        scheduler.decide(step, slack, TPOT_MS, READY)
        took.append((time.perf_counter_ns() - started) / 1e3)
    p50, p99 = np.percentile(took, (50, 99))
    return {"p50_us": round(float(p50), 2), "p99_us": round(float(p99), 2), "max_us": round(max(took), 2)}


def _taught(rng: random.Random) -> Predictor:
    predictor = Predictor()
    for index in range(TAUGHT):
        step, corun = _step(rng), index % 2 == 1
        alone = 40.0 + 6.0 * step.batch + 0.01 * step.context_tokens + 1.5 * step.prefill_tokens
        predictor.observe(step, (1.3 if corun else 1.0) * alone * rng.uniform(0.95, 1.08), corun=corun)
    return predictor


def _step(rng: random.Random) -> Step:
    batch = rng.randrange(1, 33)
    if rng.random() < 0.2:
        return Step("prefill", 1, 200, rng.randrange(16, 129))
    return Step("decode", batch, batch * rng.randrange(20, 1000))


def _table(report: dict[str, Any]) -> Table:
    table = Table("policy", "p50, µs", "p99, µs", "slowest, µs", f"p99 at most {GOAL_US:g}")
    for name, found in report["policies"].items():
        met = "yes" if found["p99_us"] <= GOAL_US else "no"
        table.add_row(name, *(f"{found[key]:.1f}" for key in ("p50_us", "p99_us", "max_us")), met)
    return table
