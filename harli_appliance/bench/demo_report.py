"""What the demo's measurements amount to: goals, ``report.json``, the page, and the summary in the terminal.

Knows what was promised. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table as ConsoleTable

from harli_appliance import __version__
from harli_appliance.bench.demo_run import CONTROL, TAUGHT, Measurements
from harli_appliance.bench.figures import loss_per_step, memory_split, rates_over_time, tpot_over_time
from harli_appliance.bench.replay import compare_answers, summarise
from harli_appliance.bench.report import Conversation, Goal, Page, Picture, Table

_ENDS: Final = 3
"""The first and the last loss are means of this many steps: a single step is as lucky as its examples."""


def build_report(
    seen: Measurements, machine: Mapping[str, str | int | float | None], duration_s: float
) -> dict[str, Any]:
    """The content of ``report.json``; `duration_s` is that of the whole demo."""
    serving = summarise(seen.both, seen.slo)
    compared, differing = compare_answers(seen.serve_only, seen.both)
    rate, alone = seen.training_tokens_per_s, seen.train_only_tokens_per_s
    pool = seen.status.pool
    report: dict[str, Any] = {
        "harli_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "harli demo",
        "duration_s": round(duration_s, 1),
        "model": seen.model,
        "slo": {"tpot_ms": seen.slo.tpot_ms, "ttft_ms": seen.slo.ttft_ms},
        "serving": {
            **serving,
            "identical_answers": differing == 0 if compared else None,
            "compared_answers": compared,
            "differing_answers": differing,
        },
        "serve_only": summarise(seen.serve_only, seen.slo),
        "train_only": {"tokens_per_s": round(alone, 2)},
        "training": {
            "tokens": seen.status.training.tokens,
            "tokens_per_s": None if rate is None else round(rate, 2),
            "share_of_train_only": None if rate is None else round(rate / alone, 4),
            "steps": seen.steps,
            "loss_first": _mean(seen.losses[:_ENDS]),
            "loss_last": _mean(seen.losses[-_ENDS:]),
            "losses": [round(loss, 4) for loss in seen.losses],
        },
        "memory": {
            "pool_slots": pool.slots,
            "leased_slots_max": pool.leased_max,
            "reclaims": pool.reclaims,
        },
        "adapter": {
            "name": seen.adapter,
            "question": seen.before.question,
            "before": seen.before.answer,
            "after": seen.after.answer,
            "control_before": seen.before.control,
            "control_after": seen.after.control,
        },
        "machine": dict(machine),
    }
    report["goals"] = {goal.name: goal.as_json() for goal in judge(report)}
    return report


def judge(report: dict[str, Any]) -> list[Goal]:
    """What the demo must show, and whether it did."""
    serving, training, adapter = report["serving"], report["training"], report["adapter"]
    attainment, share = serving["attainment"], training["share_of_train_only"]
    first, last = training["loss_first"], training["loss_last"]
    before, after = (TAUGHT in adapter[key].lower() for key in ("before", "after"))
    alone = report["train_only"]["tokens_per_s"]
    return [
        Goal(
            "attainment",
            "answers within the promise",
            "at least 99%",
            "no answers" if attainment is None else f"{attainment:.1%} of {serving['requests']}",
            attainment is not None and attainment >= 0.99,
        ),
        Goal("failed", "failed requests", "0", str(serving["failed"]), serving["failed"] == 0),
        Goal(
            "training",
            "training speed beside serving",
            "at least 50% of training alone",
            (
                "not measured: the job ended too soon"
                if share is None
                else f"{share:.0%} ({training['tokens_per_s']:.1f} of {alone:.1f} tokens/s)"
            ),
            share is not None and share >= 0.5,
        ),
        Goal(
            "loss",
            "loss at the end",
            "less than half of the first",
            "no steps" if first is None else f"{last:.3f} after {first:.3f}",
            first is not None and last < 0.5 * first,
        ),
        Goal(
            "answer",
            "answer changed as taught",
            f'says "{TAUGHT}" after, not before',
            {
                (False, True): "as taught",
                (True, True): "said it before training too",
                (True, False): "said it only before",
                (False, False): "did not learn it",
            }[before, after],
            after and not before,
        ),
    ]


def build_page(seen: Measurements, report: dict[str, Any]) -> Page:
    """The content of ``report.html``."""
    serving, training = report["serving"], report["training"]
    machine = report["machine"]
    ends = min(_ENDS, len(seen.losses))
    factor = seen.slo.tpot_ms / report["serve_only"]["tpot_ms"]["p99"]
    return Page(
        title="Serving and finetuning at the same time",
        lead=(
            f"{seen.model} answered {serving['requests']} bursty requests while a LoRA adapter of it was "
            f"trained on the same weights, on {machine['cores']} cores of one machine. The promise was "
            f"{factor:.2g} times the p99 of the time per output token of serving alone, measured just before."
        ),
        goals=judge(report),
        conversations=[
            Conversation(
                seen.before.question,
                [
                    (f"{seen.model}, before", seen.before.answer),
                    (f"{seen.adapter}, after", seen.after.answer),
                ],
            ),
            Conversation(
                f"{CONTROL} (not part of the lesson)",
                [
                    (f"{seen.model}, before", seen.before.control),
                    (f"{seen.adapter}, after", seen.after.control),
                ],
            ),
        ],
        pictures=[
            Picture(
                "Time per output token",
                "Each dot is one answer where it ended, as its client measured it: the time from its first to "
                "its last token, divided by the tokens between.",
                tpot_over_time([*seen.serve_only, *seen.both], seen.slo.tpot_ms, seen.phases),
            ),
            Picture(
                "Training and serving",
                "Training counts a token when its backward pass is done, serving when it is sent.",
                rates_over_time(seen.samples, seen.train_only_tokens_per_s, seen.phases),
            ),
            Picture(
                "Loss",
                f"Mean of the first {ends} steps: {_number(training['loss_first'], 3)}; of the last "
                f"{ends}: {_number(training['loss_last'], 3)}.",
                loss_per_step(seen.losses),
            ),
            Picture(
                "Memory",
                "One pool of KV-cache slots. Training borrows what serving does not need; cached prefixes make "
                "room for both.",
                memory_split(seen.samples, seen.phases),
            ),
        ],
        tables=[
            _serving_table("Serving beside training", serving),
            _serving_table("Serving alone", report["serve_only"]),
            _training_table(report),
            _machine_table(report),
        ],
        footer=f"harli-appliance {__version__}, {report['finished_at']}. Percentiles are interpolated linearly.",
    )


def print_summary(report: dict[str, Any], console: Console) -> None:
    """The report in a few lines."""
    table = ConsoleTable(box=None, pad_edge=False, header_style="dim")
    for column in ("goal", "target", "measured", ""):
        table.add_column(column)
    for goal in report["goals"].values():
        mark = "[green]✓ met" if goal["met"] else "[red]✗ missed"
        table.add_row(goal["title"], goal["target"], goal["value"], mark)
    console.print(table)
    adapter = report["adapter"]
    console.print()
    console.print(adapter["question"], markup=False, highlight=False, style="bold")
    for label in ("before", "after"):
        console.print(f"  {label:7}{adapter[label]}", markup=False, highlight=False, soft_wrap=True)


def _serving_table(title: str, numbers: dict[str, Any]) -> Table:
    def pair(name: str) -> str:
        return f"{_number(numbers[name]['p50'])} / {_number(numbers[name]['p99'])} ms"

    rows = [
        ("requests", f"{numbers['requests']}, {numbers['failed']} failed"),
        ("TPOT p50 / p99", pair("tpot_ms")),
        ("gap between tokens p50 / p99", pair("itl_ms")),
        ("TTFT p50 / p99", pair("ttft_ms")),
        ("output tokens/s", _number(numbers["output_tokens_per_s"], 1)),
    ]
    if (compared := numbers.get("compared_answers")) is not None:
        same = f"{compared - numbers['differing_answers']} of {compared} repeated questions"
        rows.append(("same answer as without training", same))
    return Table(title, rows)


def _training_table(report: dict[str, Any]) -> Table:
    training, memory = report["training"], report["memory"]
    return Table(
        "Training",
        [
            ("tokens/s beside serving", _number(training["tokens_per_s"], 1)),
            ("tokens/s alone", _number(report["train_only"]["tokens_per_s"], 1)),
            ("tokens", f"{training['tokens']:,}"),
            ("optimizer steps", str(training["steps"])),
            ("slots leased at most", f"{memory['leased_slots_max']:,} of {memory['pool_slots']:,}"),
            ("slots reclaimed by serving", f"{memory['reclaims']:,} times"),
        ],
    )


def _machine_table(report: dict[str, Any]) -> Table:
    machine = report["machine"]
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("memory", f"{machine['memory_gib']} GiB"),
        ("system", str(machine["platform"])),
        ("Python", str(machine["python"])),
    ]
    rows += [(name, str(machine[name] or "-")) for name in ("torch", "sglang", "transformers", "peft")]
    rows.append(("duration of the run", f"{report['duration_s']:.0f} s"))
    return Table("Machine", rows)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
