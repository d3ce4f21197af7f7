"""The page of a plan: the same pictures as a measured comparison, and on top that nothing was measured.

Knows the report and the words. Draws nothing itself (`bench.compare_figures`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harli_appliance.bench.compare_figures import speed_bars, trade_off
from harli_appliance.bench.report import Goal, Page, Picture, Table, Words
from harli_appliance.bench.verdict import OURS


def build_page(report: Mapping[str, Any]) -> Page:
    """The content of ``report.html``."""
    machine, limits = report["machine"], report.get("physical_limit", {})
    parts: list[Words | Picture] = [_warning(machine)]
    for label, section in report["slos"].items():
        parts += _pictures(label, section)
    return Page(
        title=f"SIMULATED: finetuning beside serving on {report['replicas']} x {machine['device']}",
        lead=f"What {report.get('model', 'the measured model')} leaves room for, policy by policy. Nothing here "
        "was measured.",
        goals=[Goal(name, **goal) for name, goal in report["goals"].items()],
        tables=[
            *(_limit_table(label, loads) for label, loads in limits.items()),
            Table("Simulated device", [(name, _text(value)) for name, value in machine.items()]),
            Table("Trace", [(name, _text(value)) for name, value in report["trace"].items()]),
        ],
        pictures=[],
        conversations=[],
        footer=f"harli-appliance {report['harli_version']}, {report['finished_at']}. {report['command']}",
        parts=parts,
    )


def _warning(machine: Mapping[str, Any]) -> Words:
    source = "published figures" if "published" in machine else "steps that were measured"
    return Words(
        "What this is",
        [
            f"A simulation. The costs of steps come from {source}; scheduler, policies, predictor and deadlines "
            "are the appliance's own code. docs/planner.md says what is assumed.",
            "Load is in percent of the requests per second that serving alone can take under the promise.",
        ],
    )


def _pictures(label: str, section: Mapping[str, Any]) -> list[Picture]:
    slo, policies = section["slo"], section["policies"]
    short = label.replace(".", "_")
    return [
        Picture(
            f"Finetuning speed when {label} is promised ({slo['tpot_ms']:.1f} ms per token), simulated",
            "Green kept the promise, red broke it. The number beside each bar is the attainment.",
            speed_bars(policies, f"bars{short}"),
        ),
        Picture(
            "Speed against kept promises, simulated",
            "Up is more finetuning, right is more kept promises. Right of the orange line the promise is kept.",
            trade_off(policies, f"trade{short}"),
        ),
    ]


def _limit_table(label: str, loads: Mapping[str, Any]) -> Table:
    rows = []
    for load, limit in loads.items():
        share = "" if limit["reached"] is None else f", of which {OURS} reaches {limit['reached']:.0%}"
        rows.append((f"load {load}%", f"{limit['tokens_per_s']:,.0f} finetune tokens/s{share}"))
    return Table(f"Physical limit under {label}", rows)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
