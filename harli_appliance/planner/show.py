"""A plan on the terminal: for each promise and load, what each policy keeps and how fast it trains. Knows rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from harli_appliance.bench.verdict import OURS, keeps


def print_plan(report: Mapping[str, Any], console: Console) -> None:
    """One table for each promise. A policy that breaks the promise is shown in brackets, and wins nothing."""
    device, trace = report["machine"]["device"], report["trace"]
    console.print(
        f"[bold]SIMULATED[/bold], not measured: {report.get('model', 'the calibrated model')} on "
        f"{report['replicas']} x {device}; {trace['name']}, {trace['requests']} requests in "
        f"{trace['duration_s']:.0f} s" + (", prompts read elsewhere" if report["decode_only"] else ""),
        highlight=False,
    )
    if window := report["machine"].get("window_tokens"):
        console.print(f"work units of {window:,} tokens (training.window_tokens)", highlight=False)
    for label, section in report["slos"].items():
        _print_section(label, section, report.get("physical_limit", {}).get(label, {}), console)


def print_validation(found: Mapping[str, Any], console: Console) -> None:
    """What was measured and what was predicted, for each policy, promise and load."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("policy", "slo", "load", "measured tokens/s", "predicted", "error"):
        table.add_column(name, justify="left" if name in ("policy", "slo") else "right")
    for row in found["cells"]:
        mark = "" if row["predicted_within_goal"] else " *"
        table.add_row(
            row["policy"],
            row["slo"],
            f"{row['load']}%",
            f"{row['measured_tokens_per_s']:.1f}",
            f"{row['predicted_tokens_per_s']:.1f}",
            f"{row['error']:.0%}{mark}",
        )
    console.print(table)
    if found["cells"]:
        console.print(
            f"{found['within_goal']:.0%} of these within {found['goal']:.0%}; "
            f"median error {found['median_error']:.1%}",
            highlight=False,
        )


def _print_section(
    label: str, section: Mapping[str, Any], limits: Mapping[str, Any], console: Console
) -> None:
    slo, policies = section["slo"], section["policies"]
    loads = sorted({load for cells in policies.values() for load in cells}, key=int)
    best = {load: _winner(policies, load) for load in loads}
    title = f"time per token at most {slo['tpot_ms']:.1f} ms"
    title += f" ({label})" if label.endswith("x") else ""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("finetune tokens/s")
    for load in loads:
        rate = slo["capacity_per_s"] * int(load) / 100
        table.add_column(f"{load}% ({rate:.2f} req/s)", justify="right")
    for name, cells in policies.items():
        table.add_row(
            name, *(_cell(cells.get(load), name == best[load]) for load in loads)
        )  # what a policy was not run at stays empty
    if limits:
        table.add_row("physical limit", *(f"{limits[load]['tokens_per_s']:,.0f}" for load in loads))
        reached = (limits[load]["reached"] for load in loads)
        table.add_row(f"of it, {OURS}", *("-" if share is None else f"{share:.0%}" for share in reached))
    console.print(table)


def _winner(policies: Mapping[str, Any], load: str) -> str | None:
    keeping = [name for name, cells in policies.items() if load in cells and keeps(cells[load])]
    return max(keeping, key=lambda name: policies[name][load]["finetune_tokens_per_s"], default=None)


def _cell(cell: Mapping[str, Any] | None, best: bool) -> str:
    if cell is None:
        return ""
    rate = f"{cell['finetune_tokens_per_s']:,.0f}"
    if not keeps(cell):
        met = "-" if cell["attainment"] is None else f"{cell['attainment']:.1%}"
        return f"[dim]({rate}; {met} met)[/dim]"
    return f"[bold green]{rate} *[/bold green]" if best else rate
