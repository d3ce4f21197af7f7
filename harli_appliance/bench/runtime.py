"""``harli bench runtime``: what the appliance adds to SGLang's step, and what its parts are worth, against goals.

Each model is measured in a process of its own (`runtime_child`); this one knows the goals, prints the table and
writes ``runtime.json``. Imports neither torch nor SGLang.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harli_appliance import __version__
from harli_appliance.bench.goals import Goal, judged, rounded, told
from harli_appliance.bench.machine import describe_machine
from harli_appliance.bench.part import measure_part
from harli_appliance.bench.progress import Narrator, make_out
from harli_appliance.config import Settings, load_settings
from harli_appliance.models.catalog import resolve_model

MODEL = "smollm2-135m-instruct"
CHILD = (sys.executable, "-m", "harli_appliance.bench.runtime_child")
Found = Mapping[str, Mapping[str, Any]]


GOALS = (
    Goal("overhead_ms_p50", "our tick over SGLang's own step, ms (p50)", 1.0),
    Goal("attention.tiny_bs32_ratio_to_plain", "tiny model, 32 requests: step / plain torch", 1.5),
    Goal(
        "attention.smollm2_bs16_speedup",
        "SmolLM2, 16 requests of 128 to 1024 tokens: torch_native / ours",
        1.3,
        at_least=True,
    ),
    Goal(
        "projections.least_speedup",
        "SmolLM2, 1 to 4 requests: SGLang's projections / ours, least",
        1.0,
        at_least=True,
    ),
    Goal("prefix.ttft_ratio", "512 shared tokens: second TTFT / first", 0.5),
    Goal("hotload.max_step_ratio", "loading an adapter: longest step / median", 2.0),
)


def run(out: Path, json_output: bool, *, settings: Settings | None = None) -> int:
    """Measure, print, and write ``runtime.json`` into `out`.

    Returns:
        0 when all goals are met, 1 when one is not, otherwise the error's own exit code.
    """
    return told(
        lambda errors: _measure(out.absolute(), settings or load_settings(), errors),
        table,
        out / "runtime.json",
        json_output,
    )


def _measure(out: Path, settings: Settings, errors: Console) -> dict[str, Any]:
    began = time.monotonic()
    make_out(out)
    with Narrator(errors) as narrator, tempfile.TemporaryDirectory(prefix="harli-bench-") as scratch:
        with narrator.step(f"Model {MODEL}"):
            model = resolve_model(MODEL, settings)
        with narrator.step("Tiny model: overhead, prefix cache, attention"):
            tiny = _part("tiny", Path(scratch) / "tiny", Path(scratch), out)
        with narrator.step("SmolLM2: attention, projections, loading adapters"):
            smollm2 = _part("smollm2", model, Path(scratch), out)
    report = build_report(tiny, smollm2, describe_machine(), time.monotonic() - began)
    (out / "runtime.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _part(part: str, model: Path, scratch: Path, out: Path) -> Found:
    """The measurements of one process; its messages go to ``runtime-PART.log`` in `out`."""
    found: Found = measure_part(CHILD, [part, str(model), str(scratch)], out / f"runtime-{part}.log")
    return found


def build_report(
    tiny: Found, smollm2: Found, machine: Mapping[str, str | int | float | None], duration_s: float
) -> dict[str, Any]:
    """The content of ``runtime.json``; times in milliseconds."""
    overhead, small = tiny["overhead"], tiny["attention"]
    large, short = smollm2["attention"], smollm2["attention_short"]
    prefix, hotload, few = tiny["prefix"], smollm2["hotload"], smollm2["few"]
    report: dict[str, Any] = {
        "harli_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "harli bench runtime",
        "duration_s": round(duration_s, 1),
        "overhead_ms_p50": overhead["overhead_ms"],
        "overhead": {"tick_ms_p50": overhead["tick_ms"], "sglang_step_ms_p50": overhead["step_ms"]},
        "attention": {
            "tiny_bs32_ratio_to_plain": small["ratio_to_plain"],
            "tiny_bs32_torch_native_ratio_to_plain": small["torch_native_ratio_to_plain"],
            "tiny_bs32_ms": small["ours"],
            "tiny_bs32_torch_native_ms": small["torch_native"],
            "tiny_bs32_plain_ms": small["plain"],
            "tiny_bs32_same_tokens": small["same_tokens"],
            "smollm2_bs16_speedup": large["speedup"],
            "smollm2_bs16_ms": large["ours"],
            "smollm2_bs16_torch_native_ms": large["torch_native"],
            "smollm2_bs16_short_speedup": short["speedup"],
            "smollm2_bs16_short_ms": short["ours"],
            "smollm2_bs16_short_torch_native_ms": short["torch_native"],
        },
        "projections": {
            "least_speedup": min(each["speedup"] for each in few.values()),
            "requests": few,
        },
        "prefix": {
            "ttft_ratio": prefix["second_ms"] / prefix["first_ms"],
            "first_ms": prefix["first_ms"],
            "second_ms": prefix["second_ms"],
        },
        "hotload": {
            "max_step_ratio": hotload["longest_ms"] / hotload["median_ms"],
            "median_ms": hotload["median_ms"],
            "longest_ms": hotload["longest_ms"],
            "load_ms": hotload["load_ms"],
        },
    }
    report = rounded(report)
    report["goals"] = judged(report, GOALS)
    report["machine"] = dict(machine)
    return report


def table(report: Mapping[str, Any]) -> Table:
    """Goals with what was measured, and the numbers behind each."""
    attention, prefix, hotload = report["attention"], report["prefix"], report["hotload"]
    overhead = report["overhead"]
    behind = (
        f"{overhead['tick_ms_p50']:.2f} - {overhead['sglang_step_ms_p50']:.2f} ms",
        f"{attention['tiny_bs32_ms']:.2f} / {attention['tiny_bs32_plain_ms']:.2f} ms; "
        f"torch_native {attention['tiny_bs32_torch_native_ms']:.2f} ms "
        f"= {attention['tiny_bs32_torch_native_ratio_to_plain']:.2f}",
        f"{attention['smollm2_bs16_torch_native_ms']:.1f} / {attention['smollm2_bs16_ms']:.1f} ms; "
        f"{attention['smollm2_bs16_short_speedup']:.2f} for prompts of 128 to 384 tokens",
        "; ".join(
            f"{count}: {each['sglang_ms']:.0f} / {each['ours_ms']:.0f} ms"
            for count, each in report["projections"]["requests"].items()
        ),
        f"{prefix['second_ms']:.1f} / {prefix['first_ms']:.1f} ms",
        f"{hotload['longest_ms']:.1f} / {hotload['median_ms']:.1f} ms; load {hotload['load_ms']:.1f} ms",
    )
    made = Table("measured", "value", "goal", "", "from", box=None, pad_edge=False, header_style="bold")
    for goal, numbers in zip(report["goals"].values(), behind, strict=True):
        verdict = "[green]met[/]" if goal["met"] else "[red]not met[/]"
        made.add_row(goal["title"], f"{goal['value']:.3f}", goal["wanted"], verdict, numbers)
    return made
