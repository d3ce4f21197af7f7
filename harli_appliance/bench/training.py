"""``harli bench training``: work units beside PEFT with backpropagation as it comes, and with checkpointed layers.

SmolLM2-135M, all-linear LoRA of rank 16, one sequence of 1,024 and one of 4,096 tokens. Memory is measured in a
process of its own for each contender, speed in one where they take turns (`training_child`); this one knows the
goals, prints the table and writes ``training.json``. Imports neither torch nor SGLang.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
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
CHILD = (sys.executable, "-m", "harli_appliance.bench.training_child")
SPARED = "spared"
"""Our units with idle slots at hand, in which a layer's outputs are kept for its backward pass."""
CONTENDERS = {
    "ours": "work units",
    SPARED: "work units, idle slots used",
    "checkpointing": "PEFT, checkpointed layers",
    "plain": "PEFT, plain",
}
WINDOWS = {"ours": 256, SPARED: 512}
"""Tokens of a forward or backward unit; where memory is idle, wider ones, which compute faster and work in more of
it. All larger than beside serving (`training.window_tokens`): here nobody waits for a unit to end."""
SPEED = "speed"
SHORT, LONG = 1024, 4096
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Where memory is measured: every tensor of some size gets pages of its own, which go back when it does. Without,
a process holds up to 1.6 times what its tensors need, for one contender more than for another, by the order in
which they happen to be freed."""
ROOM = 1.5
"""A contender is measured on the long sequence when so many times what it should take is free."""

GOALS = (
    Goal("seq_1024.peak_ratio_plain", "1,024 tokens: our peak / plain backpropagation", 0.1),
    Goal("seq_1024.peak_ratio_checkpointing", "1,024 tokens: our peak / checkpointed layers", 1 / 3),
    Goal(
        "seq_1024.speed_ratio_plain",
        "1,024 tokens: our tokens/s / plain, idle slots used",
        1.0,
        at_least=True,
    ),
    Goal("seq_4096.peak_ratio_formula", "4,096 tokens: our peak / layer inputs, K and V", 2.0),
    Goal("seq_4096.growth", "our peak at 4,096 / at 1,024 tokens", LONG / SHORT),
)

Peaks = Mapping[str, Mapping[str, float]]
"""By contender: peak_mib, formula_mib, loss."""


def run(out: Path, json_output: bool, *, settings: Settings | None = None) -> int:
    """Measure, print, and write ``training.json`` into `out`.

    Returns:
        0 when all goals are met, 1 when one is not, otherwise the error's own exit code.
    """
    return told(
        lambda errors: _measure(out.absolute(), settings or load_settings(), errors),
        table,
        out / "training.json",
        json_output,
    )


def _measure(out: Path, settings: Settings, errors: Console) -> dict[str, Any]:
    began = time.monotonic()
    make_out(out)
    peaks: dict[int, dict[str, dict[str, float]]] = {SHORT: {}, LONG: {}}
    with Narrator(errors) as narrator:
        with narrator.step(f"Model {MODEL}"):
            model = resolve_model(MODEL, settings)
        for tokens, name in ((tokens, name) for tokens in peaks for name in CONTENDERS):
            if tokens == LONG and name == SPARED:
                continue
            if tokens == LONG and name != "ours" and not _fits(peaks[SHORT][name]["peak_mib"] * LONG / SHORT):
                continue
            with narrator.step(f"{tokens:,} tokens: peak memory of {CONTENDERS[name]}"):
                peaks[tokens][name] = _part(name, model, tokens, out)
        with narrator.step(f"{SHORT:,} tokens: speed, taking turns"):
            seconds: dict[str, list[float]] = _part(SPEED, model, SHORT, out)
    report = build_report(peaks[SHORT], peaks[LONG], seconds, describe_machine(), time.monotonic() - began)
    (out / "training.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _part(part: str, model: Path, tokens: int, out: Path) -> Any:
    arguments = [part, str(model), str(tokens)]
    log = out / f"training-{part}-{tokens}.log"
    return measure_part(CHILD, arguments, log, None if part == SPEED else EXACT)


def _fits(mib: float) -> bool:
    """Whether this machine has room for so much, and some to spare. Else it would be killed, or others would."""
    return ROOM * mib < available_mib()


def available_mib() -> float:
    """Memory that processes can still take without swapping, as proc(5) estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:"))


def build_report(
    short: Peaks,
    long: Peaks,
    seconds: Mapping[str, Sequence[float]],
    machine: Mapping[str, str | int | float | None],
    duration_s: float,
) -> dict[str, Any]:
    """The content of ``training.json``.

    Args:
        short, long: peaks above the loaded model for 1,024 and for 4,096 tokens. A contender that had no room for
            the long sequence is left out there.
        seconds: of optimizer steps on 1,024 tokens, by contender; the same place in each list is the same round,
            and steps are compared within rounds: a machine that is shared is not as fast in one as in another.
    """
    ours = short["ours"]["peak_mib"]
    report: dict[str, Any] = {
        "harli_version": __version__,
        "command": "harli bench training",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": duration_s,
        "seq_1024": {
            "peak_ratio_plain": ours / short["plain"]["peak_mib"],
            "peak_ratio_checkpointing": ours / short["checkpointing"]["peak_mib"],
            "peak_ratio_formula": ours / short["ours"]["formula_mib"],
            "speed_ratio_plain": _ratio(seconds["plain"], seconds[SPARED]),
            "speed_ratio_checkpointing": _ratio(seconds["checkpointing"], seconds[SPARED]),
            "least_memory": {
                "speed_ratio_plain": _ratio(seconds["plain"], seconds["ours"]),
                "speed_ratio_checkpointing": _ratio(seconds["checkpointing"], seconds["ours"]),
            },
            "idle_slots": {
                "peak_ratio_plain": short[SPARED]["peak_mib"] / short["plain"]["peak_mib"],
                "peak_ratio_checkpointing": short[SPARED]["peak_mib"] / short["checkpointing"]["peak_mib"],
            },
            "window_tokens": WINDOWS,
            "tokens_per_s": {name: SHORT / statistics.median(taken) for name, taken in seconds.items()},
            "step_s": {name: [round(took, 2) for took in taken] for name, taken in seconds.items()},
            **_by_contender(short),
        },
        "seq_4096": {
            "peak_ratio_formula": long["ours"]["peak_mib"] / long["ours"]["formula_mib"],
            "growth": long["ours"]["peak_mib"] / ours,
            **{
                f"peak_ratio_{name}": long["ours"]["peak_mib"] / long[name]["peak_mib"]
                if name in long
                else None
                for name in ("plain", "checkpointing")
            },
            **_by_contender(long),
        },
    }
    report = rounded(report)
    report["goals"] = judged(report, GOALS)
    report["machine"] = dict(machine)
    return report


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def _by_contender(peaks: Peaks) -> dict[str, dict[str, float]]:
    return {key: {name: found[key] for name, found in peaks.items()} for key in ("peak_mib", "loss")}


def table(report: Mapping[str, Any]) -> Table:
    """Goals with what was measured, and the numbers behind each."""
    short, long = report["seq_1024"], report["seq_4096"]
    peak, rate = short["peak_mib"], short["tokens_per_s"]
    behind = (
        f"{peak['ours']:.0f} / {peak['plain']:.0f} MiB",
        f"{peak['ours']:.0f} / {peak['checkpointing']:.0f} MiB",
        f"{rate[SPARED]:.1f} / {rate['plain']:.1f} tokens/s in {peak[SPARED]:.0f} MiB; "
        f"{rate['ours']:.1f} in {peak['ours']:.0f}; checkpointed {rate['checkpointing']:.1f}",
        _long_peaks(long["peak_mib"]),
        f"{long['peak_mib']['ours']:.0f} / {peak['ours']:.0f} MiB",
    )
    made = Table("measured", "value", "goal", "", "from", box=None, pad_edge=False, header_style="bold")
    for goal, numbers in zip(report["goals"].values(), behind, strict=True):
        verdict = "[green]met[/]" if goal["met"] else "[red]not met[/]"
        made.add_row(goal["title"], f"{goal['value']:.3f}", goal["wanted"], verdict, numbers)
    return made


def _long_peaks(peaks: Mapping[str, float]) -> str:
    others = (
        f"{name} {peaks[name]:.0f} MiB" if name in peaks else f"{name}: no room on this machine"
        for name in ("checkpointing", "plain")
    )
    return f"{peaks['ours']:.0f} MiB; {'; '.join(others)}"
