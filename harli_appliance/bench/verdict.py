"""Where our policy wins, ties and loses, and what it had to show.

A rival counts where it keeps the promise itself. Ours is compared with the fastest of these, repetition by
repetition: both had the same requests then, so that the difference is free of how lucky these were. Knows the
cells of ``report.json`` (`comparison`); does not know whether they were measured or simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from harli_appliance.bench.intervals import interval
from harli_appliance.bench.report import Goal

ATTAINMENT_GOAL: Final = 0.99
OURS: Final = "adaptive"
REFERENCE: Final = "serve_only"
"""Never trains: a promise that it breaks cannot be kept by anybody."""
SLICING_RIVALS: Final = ("time_slice", "flexllm", "llmstation")
"""With their variants: `time_slice:64` is one of `time_slice`."""
SLICING_FACTOR: Final = 1.3
STATIC: Final = "static"

Outcome = Literal["wins", "ties", "loses", "breaks"]
Cells = Mapping[str, Any]
Policies = Mapping[str, Cells]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours at one load.

    Attributes:
        outcome: "breaks" where it does not keep the promise; otherwise how it trains beside the fastest rival
            that does: "ties" when the confidence interval of the difference holds 0.
        rival: that rival; None when no other keeps the promise.
        difference: ours minus its, finetune tokens/s; None without a rival.
        difference_ci: half the width of its confidence interval; None with fewer than two repetitions.
        text: one sentence that says all this, with what qualifies it.
    """

    outcome: Outcome
    rival: str | None
    difference: float | None
    difference_ci: float | None
    text: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def keeps(cell: Cells) -> bool:
    """Whether a cell's attainment is at least `ATTAINMENT_GOAL`."""
    return (cell["attainment"] or 0.0) >= ATTAINMENT_GOAL


def verdicts(policies: Policies, slo_tpot_ms: float) -> dict[str, Verdict]:
    """One for each load that ours was run at; empty when it was not."""
    return {load: _verdict(policies, load, slo_tpot_ms) for load in policies.get(OURS, {})}


def _verdict(policies: Policies, load: str, slo_tpot_ms: float) -> Verdict:
    ours = policies[OURS][load]
    if not keeps(ours):
        return Verdict("breaks", None, None, None, _broken(policies, load, slo_tpot_ms))
    rivals = [
        name
        for name, cells in policies.items()
        if name.split(":")[0] != OURS and load in cells and keeps(cells[load])
    ]
    if not rivals:
        return Verdict("wins", None, None, None, f"{_rate(ours)}; no other policy keeps the promise")
    best = max(rivals, key=lambda name: policies[name][load]["finetune_tokens_per_s"])
    mean, half = difference(ours, policies[best][load])
    reach = half if half is not None else 0.0
    outcome: Outcome = "wins" if mean > reach else "loses" if mean < -reach else "ties"
    spread = "" if half is None else f" ± {half:.1f}"
    text = f"{_rate(ours)} against {_rate(policies[best][load])} of {best}; difference {mean:+.1f}{spread}"
    if outcome == "loses" and (why := _waited(ours, policies[best][load], best)):
        text += f"; {why}"
    return Verdict(outcome, best, round(mean, 3), None if half is None else round(half, 3), text)


def _waited(ours: Cells, theirs: Cells, rival: str) -> str | None:
    """Why a rival that keeps the promise trained more, as far as the modes tell."""
    if not ours["modes"] or not theirs["modes"]:
        return None
    mine, other = (cell["modes"].get("pause", 0.0) for cell in (ours, theirs))
    return f"training waited for {mine:.0%} of the time, under {rival} for {other:.0%}"


def oracle_static(policies: Policies) -> dict[str, str]:
    """For each load the split that is best when it may never change: the fastest training among the static
    policies that keep the promise, or the one with the highest attainment when none does."""
    static = {name: cells for name, cells in policies.items() if name.split(":")[0] == STATIC}
    found: dict[str, str] = {}
    for load in dict.fromkeys(load for cells in static.values() for load in cells):
        run = {name: cells[load] for name, cells in static.items() if load in cells}

        def worth(name: str, run: Policies = run) -> tuple[float, float]:
            cell = run[name]
            kept = keeps(cell)
            return (1.0 if kept else cell["attainment"] or 0.0, cell["finetune_tokens_per_s"])

        found[load] = max(run, key=worth)
    return found


def _broken(policies: Policies, load: str, slo_tpot_ms: float) -> str:
    ours = policies[OURS][load]
    if ours["attainment"] is None:
        return "no request arrived in its runs"
    missed = round(ours["requests"] * (1.0 - ours["attainment"]))
    text = f"{missed} of {ours['requests']} requests missed the promise of {slo_tpot_ms:.0f} ms"
    reference = policies.get(REFERENCE, {}).get(load)
    if reference is not None and not keeps(reference):
        missed = round(reference["requests"] * (1.0 - (reference["attainment"] or 0.0)))
        text += f"; {REFERENCE}, which never trains, missed {missed}: the machine cannot keep it here"
    return text


def difference(ours: Cells, theirs: Cells) -> tuple[float, float | None]:
    """Mean of our finetune tokens/s minus theirs over the repetitions that both have, and half the width of its
    confidence interval (paired Student's t at 95%); None in its place with fewer than two repetitions."""
    other = {run["repetition"]: run["finetune_tokens_per_s"] for run in theirs["runs"]}
    gaps = [
        run["finetune_tokens_per_s"] - other[run["repetition"]]
        for run in ours["runs"]
        if run["repetition"] in other
    ]
    if not gaps:
        return ours["finetune_tokens_per_s"] - theirs["finetune_tokens_per_s"], None
    return interval(gaps)


def judge(label: str, section: Mapping[str, Any]) -> list[Goal]:
    """What ours has to show under one SLO; nothing when it was not among the policies."""
    policies, slo = section["policies"], section["slo"]
    ours = policies.get(OURS, {})
    goals: list[Goal] = []
    for load, cell in ours.items():
        p99, verdict = cell["tpot_ms"]["p99"], section["verdicts"][load]
        answered = cell["attainment"] is not None and p99 is not None
        goals.append(
            Goal(
                f"promise.{label}.{load}",
                f"{OURS} keeps {label} at load {load}%",
                f"{ATTAINMENT_GOAL:.0%} of requests, p99 TPOT at most {slo['tpot_ms']:.0f} ms",
                f"{cell['attainment']:.1%}, {p99:.0f} ms" if answered else "no answers",
                answered and keeps(cell) and p99 <= slo["tpot_ms"],
            )
        )
        goals.append(
            Goal(
                f"fastest.{label}.{load}",
                f"no rival that keeps {label} trains faster at load {load}%",
                "not slower beyond the confidence interval",
                verdict["text"],
                verdict["outcome"] in ("wins", "ties"),
            )
        )
    if ours:
        goals += _slicing(label, policies, sorted(ours, key=int)[len(ours) // 2])
    return goals


def _slicing(label: str, policies: Policies, middle: str) -> list[Goal]:
    """Ours over those that share time or tokens instead of the device, at the middle load."""
    ours = policies[OURS][middle]
    run = {
        name: cells[middle]
        for name, cells in policies.items()
        if name.split(":")[0] in SLICING_RIVALS and middle in cells
    }
    if not run:
        return []
    keeping = {name: cell for name, cell in run.items() if keeps(cell)}
    mine = ours["finetune_tokens_per_s"]
    if keeping:
        best = max(keeping, key=lambda name: keeping[name]["finetune_tokens_per_s"])
        theirs = keeping[best]["finetune_tokens_per_s"]
        value = f"{mine / theirs:.2f} x {best}" if theirs else f"{_rate(ours)}, {best} none"
    else:
        theirs, value = 0.0, f"{_rate(ours)}; none of them keeps the promise"
    return [
        Goal(
            f"slicing.{label}",
            f"{OURS} over the best of {', '.join(run)} under {label} at load {middle}%",
            f"at least {SLICING_FACTOR} x, among those that keep the promise",
            value,
            keeps(ours) and mine > 0 and mine >= SLICING_FACTOR * theirs,
        )
    ]


def _rate(cell: Cells) -> str:
    half = cell["finetune_tokens_per_s_ci"]
    return f"{cell['finetune_tokens_per_s']:.1f}" + ("" if half is None else f" ± {half:.1f}") + " tokens/s"
