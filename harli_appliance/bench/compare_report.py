"""A comparison's results as files and in the terminal: ``report.json``, CSV files, the page, a table.

Knows the store and the report. The page's content is in `compare_page`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harli_appliance.bench.compare_page import build_page
from harli_appliance.bench.compare_plan import ComparePlan, Run, without_folders
from harli_appliance.bench.compare_store import Basis, CompareStore, RunFile
from harli_appliance.bench.comparison import DISTURBED, build_report
from harli_appliance.bench.machine import describe_machine
from harli_appliance.bench.report import write_report
from harli_appliance.bench.traces import Trace
from harli_appliance.errors import ConfigError

_PIPE_WIDTH = 140
_RUN_COLUMNS = ("policy", "slo", "load", "repetition")

Found = Mapping[Run, RunFile]


def write_results(store: CompareStore, plan: ComparePlan, trace: Trace, command: str) -> dict[str, Any]:
    """Write everything that the runs in the store amount to; returns the report.

    Raises:
        ConfigError: the store has no runs.
    """
    report, found = read_results(store, plan, trace, command)
    write_report(store.folder, "report", report, build_page(report, found))
    _write_csvs(store.folder, found)
    return report


def read_results(
    store: CompareStore, plan: ComparePlan, trace: Trace, command: str
) -> tuple[dict[str, Any], Found]:
    """The report, and the runs that it is made from.

    Raises:
        ConfigError: the store has no runs.
    """
    basis = store.basis()
    found = {run: kept for run in plan.runs() if (kept := store.read(run)) is not None}
    if basis is None or not found:
        raise ConfigError(f"{store.folder}: nothing was measured yet")
    report = build_report(
        [kept.result for kept in found.values()],
        basis.targets,
        trace=_trace(plan, trace),
        machine=describe_machine(),
        simulated=False,
        command=without_folders(command),
        context=_context(plan, basis),
    )
    return report, found


def _trace(plan: ComparePlan, trace: Trace) -> dict[str, Any]:
    """What was replayed; lengths are those after scaling and capping."""
    return {
        "name": trace.name,
        "requests": len(trace),
        "duration_s": round(trace.duration_s, 1),
        "rate_per_s": round(trace.rate_per_s, 4),
        "skipped_rows": trace.skipped,
        "mean_prompt_tokens": round(trace.mean_prompt_tokens, 1),
        "mean_output_tokens": round(trace.mean_output_tokens, 1),
        "prompt_scale": plan.prompt_scale,
        "output_scale": plan.output_scale,
        "max_prompt_tokens": plan.max_prompt_tokens,
        "min_output_tokens": plan.min_output_tokens,
        "max_output_tokens": plan.max_output_tokens,
    }


def _context(plan: ComparePlan, basis: Basis) -> dict[str, Any]:
    return {
        "model": Path(plan.model).name,
        "replay": plan.replay,
        "repetitions": plan.repetitions,
        "seconds": plan.seconds,
        "lead_s": plan.lead_s,
        "sequence_tokens": plan.sequence_tokens,
        "seed": plan.seed,
        "light_tpot_ms": round(basis.light_tpot_ms, 3),
        "probe_tpot_ms": round(basis.probe_ms, 3),
        "disturbed_change": DISTURBED,
        "train_alone_tokens_per_s": round(basis.train_alone_tokens_per_s, 3),
        "ladder": [asdict(rung) for rung in basis.ladder],
    }


def _write_csvs(folder: Path, found: Found) -> None:
    """``runs.csv``, ``requests.csv`` and ``timeline.csv``: a row each for runs, requests and moments."""
    runs = []
    for kept in found.values():
        row = asdict(kept.result)
        for long in ("tpot_ms", "ttft_ms", "modes"):
            del row[long]
        runs.append(row | {"attainment": kept.result.attainment})
    _write_csv(folder / "runs.csv", runs)
    _write_csv(
        folder / "requests.csv", (_row(run, item) for run, kept in found.items() for item in kept.requests)
    )
    _write_csv(
        folder / "timeline.csv", (_row(run, item) for run, kept in found.items() for item in kept.moments)
    )


def _row(run: Run, item: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in _RUN_COLUMNS} | asdict(item)


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def print_summary(report: Mapping[str, Any], console: Console | None = None) -> None:
    """A table for each SLO, and the verdicts."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH, file=console.file)
    for section in report["slos"].values():
        console.print(_table(section))
        cells = [cell for loads in section["policies"].values() for cell in loads.values()]
        if disturbed := sum(cell["disturbed"] for cell in cells):
            runs = sum(len(cell["runs"]) for cell in cells)
            changed = f"became over {DISTURBED - 1:.0%} faster or slower during the run"
            console.print(f"{disturbed} of {runs} runs: the machine {changed}", soft_wrap=True)
        for load, verdict in section["verdicts"].items():
            line = f"load {load}%: adaptive {verdict['outcome']}: {verdict['text']}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(section: Mapping[str, Any]) -> Table:
    slo = section["slo"]
    made = Table(
        "policy",
        "load",
        "attainment",
        "finetune tokens/s",
        "TPOT p50 / p99, ms",
        "TTFT p99, ms",
        "requests",
        title=f"SLO {slo['label']}: {slo['tpot_ms']:.0f} ms per token, first token within "
        f"{slo['ttft_ms']:.0f} ms; capacity {slo['capacity_per_s']:.2f} requests/s",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for name, load, cell in _cells(section["policies"]):
        made.add_row(
            name,
            f"{load}%",
            _number(cell["attainment"], ".1%"),
            _number(cell["finetune_tokens_per_s"], ".1f") + _plus_minus(cell["finetune_tokens_per_s_ci"]),
            f"{_number(cell['tpot_ms']['p50'], '.0f')} / {_number(cell['tpot_ms']['p99'], '.0f')}",
            _number(cell["ttft_ms"]["p99"], ".0f"),
            str(cell["requests"]),
        )
    return made


def _cells(policies: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
    """By load, the fastest training first."""
    cells = [(name, load, cell) for name, loads in policies.items() for load, cell in loads.items()]
    return sorted(cells, key=lambda item: (int(item[1]), -item[2]["finetune_tokens_per_s"]))


def _plus_minus(half: float | None) -> str:
    return "" if half is None else f" ± {half:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
