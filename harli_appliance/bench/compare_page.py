"""The page of a comparison, for a reader who has never heard of the project: what was asked, what came out, where
ours wins and where it does not, and how it was measured.

Knows the report and the words. Draws nothing itself (`compare_figures`), measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from harli_appliance.bench.compare_figures import run_in_time, speed_bars, tpot_curves, trade_off
from harli_appliance.bench.compare_plan import Run
from harli_appliance.bench.compare_store import RunFile
from harli_appliance.bench.comparison import TRIES
from harli_appliance.bench.report import Goal, Grid, Page, Picture, Table, Words
from harli_appliance.bench.verdict import ATTAINMENT_GOAL, OURS, keeps
from harli_appliance.scheduling.names import describe_policy

_SAID: Final = {
    "wins": "wins",
    "ties": "ties",
    "loses": "is slower",
    "breaks": "breaks the promise",
}


def build_page(report: Mapping[str, Any], found: Mapping[Run, RunFile]) -> Page:
    """The content of ``report.html``."""
    parts: list[Words | Grid | Picture] = [_verdict_grid(report), *_together(report)]
    for section in report["slos"].values():
        if section["policies"]:
            parts += _section(section, found)
    parts += _in_time(report, found)
    parts.append(_method(report))
    return Page(
        title=f"Finetuning beside serving: {len(report['policies'])} policies on the same requests",
        lead=_lead(report),
        goals=[Goal(name, **goal) for name, goal in report["goals"].items()],
        tables=[_basis_table(report), _trace_table(report), _machine_table(report)],
        pictures=[],
        conversations=[],
        footer=f"harli-appliance {report['harli_version']}, {report['finished_at']}. {report['command']}",
        introduction=[_introduction(report), _policy_grid(report)],
        parts=parts,
    )


def _lead(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"One machine ({machine['cores']} cores, {machine['cpu']}) answers requests with {report['model']} and "
        "finetunes a LoRA adapter of it at the same time. The policies differ only in how they share the machine."
    )


def _introduction(report: Mapping[str, Any]) -> Words:
    promised = ", ".join(
        f"{slo['label']} = {slo['tpot_ms']:.0f} ms" for slo in (s["slo"] for s in report["slos"].values())
    )
    ttft = f"{report['slo']['ttft_ms'] / 1e3:g} s"
    return Words(
        "What is compared",
        [
            "Whoever serves a model promises a time per output token (TPOT): the time from the first to the last "
            f"token of an answer, divided by the tokens between. Here the promise (SLO) is {promised}, and {ttft} "
            "to the first token. An x is a multiple of the p99 TPOT of serving alone, one request at a time, "
            "measured in the same run. Attainment is the share of requests for which both were kept.",
            "Training may take everything else. Its speed is counted in finetuned tokens per second, forward and "
            "backward pass done.",
            "Load is in percent of the requests per second that serving alone can take under the promise. A "
            f"policy keeps the promise when at least {ATTAINMENT_GOAL:.0%} of its requests meet it. The speed of "
            "one that does not is of no use.",
        ],
    )


def _policy_grid(report: Mapping[str, Any]) -> Grid:
    names = dict.fromkeys(name for section in report["slos"].values() for name in section["policies"])
    rows = [("met" if name == OURS else "", (name, describe_policy(name))) for name in names]
    return Grid("The policies", ("name", "how it shares the machine"), rows)


def _verdict_grid(report: Mapping[str, Any]) -> Grid:
    rows = []
    for section in report["slos"].values():
        for load, verdict in section["verdicts"].items():
            mark = {"wins": "met", "ties": "met"}.get(verdict["outcome"], "missed")
            cells = [
                f"{section['slo']['label']}, load {load}%",
                f"{OURS} {_SAID[verdict['outcome']]}",
                verdict["text"],
            ]
            rows.append((mark, cells))
    return Grid(
        f"Where {OURS} wins, ties and loses, against the fastest rival that keeps the promise",
        ("promise and load", "", f"finetune tokens/s of {OURS}, of the rival, and the difference"),
        rows,
    )


def _together(report: Mapping[str, Any]) -> list[Picture]:
    """All promises in one picture, where there are several."""
    sections = [section["policies"] for section in report["slos"].values() if section["policies"]]
    if len(sections) < 2:
        return []
    pooled: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, loads in sections[0].items():
        for load in loads:
            cells = [policies[name][load] for policies in sections if load in policies.get(name, {})]
            requests = sum(cell["requests"] for cell in cells)
            kept = sum(round((cell["attainment"] or 0.0) * cell["requests"]) for cell in cells)
            pooled.setdefault(name, {})[load] = {
                "attainment": kept / requests if requests else None,
                "finetune_tokens_per_s": sum(cell["finetune_tokens_per_s"] for cell in cells) / len(cells),
                "finetune_tokens_per_s_ci": None,
            }
    return [
        Picture(
            "All promises together",
            "The mean of the finetuning speeds under all promises against the share of all requests that kept "
            "theirs. Up is more finetuning, right is more kept promises; the orange line is at 99%.",
            trade_off(pooled, "together"),
        )
    ]


def _section(section: Mapping[str, Any], found: Mapping[Run, RunFile]) -> list[Words | Grid | Picture]:
    slo, policies = section["slo"], section["policies"]
    label = slo["label"]
    short = label.replace(".", "_")
    tpots: dict[str, dict[str, list[float]]] = {}
    for run, kept in sorted(found.items(), key=lambda item: item[0].load):
        if run.slo == label:
            by_policy = tpots.setdefault(str(run.load), {})
            by_policy.setdefault(run.policy, []).extend(kept.result.tpot_ms)
    for load, by_policy in tpots.items():
        tpots[load] = {name: by_policy[name] for name in policies if name in by_policy}
    return [
        Picture(
            f"Finetuning speed when {label} is promised ({slo['tpot_ms']:.0f} ms per token)",
            "Green kept the promise, red broke it. The number beside each bar is the attainment; the whisker is "
            "the 95% confidence interval of the mean over the repetitions.",
            speed_bars(policies, f"bars{short}"),
        ),
        Picture(
            "Speed against kept promises",
            "Up is more finetuning, right is more kept promises. Right of the orange line the promise is kept.",
            trade_off(policies, f"trade{short}"),
        ),
        Picture(
            "How slow answers were",
            "Each line is one policy: the share of its answers whose time per output token is at most x. The "
            "orange line is the promise; what lies right of it was too slow. The axis ends at 2.5 times the SLO.",
            tpot_curves(tpots, slo["tpot_ms"], f"cdf{short}"),
        ),
        _numbers(section),
    ]


def _numbers(section: Mapping[str, Any]) -> Grid:
    rows = []
    cells = [
        (name, load, cell) for name, loads in section["policies"].items() for load, cell in loads.items()
    ]
    for name, load, cell in sorted(cells, key=lambda c: (int(c[1]), -c[2]["finetune_tokens_per_s"])):
        share, ends = cell["attainment"], cell["attainment_ci"]
        half = cell["finetune_tokens_per_s_ci"]
        rows.append(
            (
                "met" if keeps(cell) else "missed",
                [
                    name,
                    f"{load}%",
                    f"{cell['finetune_tokens_per_s']:.1f}" + ("" if half is None else f" ± {half:.1f}"),
                    "-" if share is None else f"{share:.1%} ({100 * ends[0]:.0f} to {100 * ends[1]:.0f})",
                    f"{_milliseconds(cell['tpot_ms']['p50'])} / {_milliseconds(cell['tpot_ms']['p99'])}",
                    f"{_milliseconds(cell['ttft_ms']['p50'])} / {_milliseconds(cell['ttft_ms']['p99'])}",
                    f"{cell['requests']} in {len(cell['runs'])}" + _disturbed(cell),
                    ", ".join(f"{mode} {time:.0%}" for mode, time in cell["modes"].items() if time >= 0.005),
                ],
            )
        )
    head = (
        "policy",
        "load",
        "finetune tokens/s",
        "attainment (95% interval)",
        "TPOT p50 / p99, ms",
        "TTFT p50 / p99, ms",
        "requests in runs",
        "share of time by mode",
    )
    return Grid(f"All numbers under {section['slo']['label']}", head, rows)


def _disturbed(cell: Mapping[str, Any]) -> str:
    return f", {cell['disturbed']} of them disturbed" if cell["disturbed"] else ""


def _in_time(report: Mapping[str, Any], found: Mapping[Run, RunFile]) -> list[Picture]:
    """The first repetition of ours at the highest load, and of its rival there."""
    slo = report["slo"]
    ours = [run for run in found if run.policy == OURS and run.slo == slo["label"] and run.repetition == 0]
    if not ours:
        return []
    busiest = max(ours, key=lambda run: run.load)
    rival = report["verdicts"][str(busiest.load)]["rival"]
    shown = [busiest, *(run for run in found if rival == run.policy and _alike(run, busiest))]
    pictures = []
    for number, run in enumerate(shown):
        kept = found[run]
        end_s = report["lead_s"] + report["seconds"]
        pictures.append(
            Picture(
                f"{run.policy} at load {run.load}% in time",
                "One run, from above: what the engine does, the requests under way, each answer where it ended, "
                f"and finetuning. Requests of the first {report['lead_s']:g} s do not count.",
                run_in_time(kept.moments, kept.requests, slo["tpot_ms"], end_s, f"time{number}"),
            )
        )
    return pictures


def _alike(run: Run, other: Run) -> bool:
    return (run.slo, run.load, run.repetition) == (other.slo, other.load, other.repetition)


def _method(report: Mapping[str, Any]) -> Words:
    how = "over HTTP, as a client does" if report["replay"] == "http" else "inside the process, without HTTP"
    return Words(
        "How it was measured",
        [
            "All policies ran in one process on the same engine, one after the other, "
            f"{report['repetitions']} times. The order rotates, so that a machine that becomes slower does so for "
            "all of them. In each repetition all policies got the same requests at the same times, from a part of "
            "the trace of its own; the words differ, so that nothing was in the prefix cache. Requests were sent "
            f"{how}, and none waited for another one to be answered.",
            f"A run lasts {report['seconds']:g} s, after {report['lead_s']:g} s that do not count. A job with "
            "more data than the runs can use was active throughout. Before them, rates were tried until the "
            "one was found at which serving alone breaks the promise, and lowered until serving alone kept it "
            "at the highest load in all parts of the trace. Serving and training then ran together once, so "
            "that the latency predictor knew this machine.",
            "The machine may be shared, and faster at one time than at another. So short answers were timed "
            "before each run, with nothing beside them. When they took a tenth longer than when the promise was "
            "made, requests came a tenth slower in that run and a tenth more was promised, and all times that "
            "were found were divided by as much: the clock goes with the machine. When it changed by more than "
            f"{report['disturbed_change'] - 1:.0%} during the run, it was made again, up to {TRIES} times in all.",
            "Speeds are means over the repetitions with Student's t intervals; the difference to a rival is taken "
            "repetition by repetition. Attainment is over all requests of all repetitions, with Wilson's "
            "interval. With few requests it is wide: one miss in fewer than 100 is already less than 99%.",
        ],
    )


def _basis_table(report: Mapping[str, Any]) -> Table:
    rows = [
        ("TPOT of serving alone, one at a time, p99", f"{report['light_tpot_ms']:.1f} ms"),
        ("TPOT of short answers, to tell how fast the machine is", f"{report['probe_tpot_ms']:.1f} ms"),
        ("finetuning alone", f"{report['train_alone_tokens_per_s']:.1f} tokens/s"),
    ]
    for section in report["slos"].values():
        slo = section["slo"]
        rows.append((f"capacity under {slo['label']}", f"{slo['capacity_per_s']:.2f} requests/s"))
    for rung in report["ladder"]:
        p99 = _milliseconds(rung["tpot_p99_ms"])
        rows.append(
            (
                f"serving alone, {rung['rate_per_s']:.2f} requests/s",
                f"TPOT p99 {p99} ms, {rung['requests']} requests",
            )
        )
    return Table("What loads are relative to", rows)


def _trace_table(report: Mapping[str, Any]) -> Table:
    trace = report["trace"]
    return Table(
        "Trace",
        [
            ("name", trace["name"]),
            ("requests in it", f"{trace['requests']:,} in {trace['duration_s']:,.0f} s"),
            ("bad rows left out", str(trace["skipped_rows"])),
            ("prompt lengths", f"times {trace['prompt_scale']:g}, at most {trace['max_prompt_tokens']}"),
            (
                "answer lengths",
                f"times {trace['output_scale']:g}, {trace['min_output_tokens']} to {trace['max_output_tokens']}",
            ),
            (
                "mean prompt, answer",
                f"{trace['mean_prompt_tokens']:.0f}, {trace['mean_output_tokens']:.0f} tokens",
            ),
        ],
    )


def _machine_table(report: Mapping[str, Any]) -> Table:
    machine = report["machine"]
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("memory", f"{machine['memory_gib']} GiB"),
        ("system", str(machine["platform"])),
    ]
    rows += [(name, str(machine[name] or "-")) for name in ("torch", "sglang", "transformers", "peft")]
    return Table("Machine", rows)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
