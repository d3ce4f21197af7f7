"""``harli bench memory``: what it costs that slots change hands between serving and training, against goals.

The numbers come from an engine in a process of its own (`memory_run`). Knows the goals, prints the table and
writes ``memory.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from harli_appliance import __version__
from harli_appliance.bench.compare_plan import ComparePlan, without_folders
from harli_appliance.bench.engine_bench import measure_in_engine
from harli_appliance.bench.machine import describe_machine
from harli_appliance.config import Settings
from harli_appliance.errors import EngineFault

FOUND: Final = "found.json"
"""What the engine's process leaves."""
LEASE_GOAL_US: Final = 200.0
UNITS_GOAL: Final = 1


def run(
    plan: ComparePlan,
    bursts: int,
    out: Path,
    *,
    json_output: bool,
    typed: str,
    settings: Settings | None = None,
) -> int:
    """Measure, print, and write ``memory.json`` into `out`.

    Returns:
        0 when the goals are met, 1 when one is not, otherwise the error's own.
    """

    def report() -> dict[str, Any]:
        return build_report(json.loads((out / FOUND).read_text(encoding="utf-8")), plan.model, typed)

    return measure_in_engine(
        "memory", plan, {"bursts": bursts}, out, report, print_table, json_output, settings
    )


def build_report(found: Mapping[str, Any], model: str, typed: str) -> dict[str, Any]:
    """The content of ``memory.json``.

    Raises:
        EngineFault: no lease was revoked, so that nothing is known of reclaims.
    """
    reclaims = found["reclaims"]
    if not reclaims:
        raise EngineFault("no lease was taken back during the bursts; ask for more with --bursts")
    leases, waited = found["leases"]["any"], [reclaim["waited_ms"] for reclaim in reclaims]
    units = max(reclaim["units"] for reclaim in reclaims)
    goals = {
        "lease_p99_us": ("lease of 4,096 slots, p99, µs", leases["lease_p99_us"], LEASE_GOAL_US),
        "release_p99_us": ("release of 4,096 slots, p99, µs", leases["release_p99_us"], LEASE_GOAL_US),
        "reclaim_units_max": ("units until revoked slots are free, most", units, UNITS_GOAL),
    }
    return {
        "harli_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_folders(typed),
        "model": model,
        "slots": found["slots"],
        **{key: value for key, (_, value, _) in goals.items()},
        "leases": found["leases"],
        "reclaims": {
            "count": len(reclaims),
            "by_purpose": {
                purpose: sum(reclaim["purpose"] == purpose for reclaim in reclaims)
                for purpose in ("outputs", "activations", "adapter")
            },
            "ms_p50": float(np.percentile(waited, 50)),
            "ms_max": max(waited),
        },
        "copies": found["copies"],
        "cache": found["cache"],
        "goals": {
            key: {"title": title, "value": value, "wanted": f"at most {most:g}", "met": value <= most}
            for key, (title, value, most) in goals.items()
        },
        "machine": describe_machine(),
    }


def print_table(report: Mapping[str, Any], console: Console) -> None:
    goals = Table("measured", "value", "goal", "", box=None, pad_edge=False, header_style="bold")
    for goal in report["goals"].values():
        verdict = "[green]met[/]" if goal["met"] else "[red]not met[/]"
        goals.add_row(goal["title"], f"{goal['value']:.4g}", goal["wanted"], verdict)
    console.print(goals)
    runs, reclaims, copies = report["leases"]["contiguous"], report["reclaims"], report["copies"]
    for line in (
        f"consecutive slots: lease p50 {runs['lease_p50_us']:.0f} µs, p99 {runs['lease_p99_us']:.0f} µs",
        f"{reclaims['count']} leases taken back in {reclaims['ms_p50']:.1f} ms (median), "
        f"{reclaims['ms_max']:.1f} ms at most",
        f"copies: {copies['out_bytes_per_s'] / 1e9:.2f} GB/s out, {copies['in_bytes_per_s'] / 1e9:.2f} GB/s back",
    ):
        console.print(line, highlight=False)
    cache = Table(
        "keep_cached", "leased", "cached before", "after", box=None, pad_edge=False, header_style="bold"
    )
    for row in report["cache"]:
        cache.add_row(
            f"{row['keep_cached']:.2f}",
            *(f"{row[key]:.0f}" for key in ("leased", "cached_before", "cached_after")),
        )
    console.print(cache)
