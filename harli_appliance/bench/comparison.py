"""A comparison of policies: what each run found, and the ``report.json`` that all runs together amount to.

The same structure holds measured and simulated runs. Knows results and their statistics; who wins is in
`verdict`. Runs nothing and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from harli_appliance import __version__
from harli_appliance.bench.intervals import CONFIDENCE, interval, share_interval
from harli_appliance.bench.replay import percentiles
from harli_appliance.bench.verdict import judge, oracle_static, verdicts

DISTURBED: Final = 1.15
"""Change of the machine's pace during a run beyond which it is made again."""
TRIES: Final = 2
"""Of a run; the one with the least change counts."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """One policy at one load under one SLO, once.

    Attributes:
        slo: label of the SLO; see `SloTarget`.
        load: percent of the capacity under that SLO.
        repetition: from 0; runs of one repetition (and SLO and load) had the same requests at the same times.
        requests: those that count.
        good: of these, the ones that met the SLO; failed and unanswered ones never do.
        failed: of these, the ones without a complete answer.
        finetune_tokens_per_s: tokens whose backward pass was done, over the time in which `requests` arrived.
        tpot_ms, ttft_ms: of the answered requests.
        modes: share of the time spent in each mode of the engine; may be empty.
        pace: how many times slower than when the promise was made the machine was before the run. All times are
            given as if it had not been.
        change: factor between that and what it was right after the run, >= 1; None where that was not measured.
    """

    policy: str
    slo: str
    load: int
    repetition: int
    requests: int
    good: int
    failed: int
    finetune_tokens_per_s: float
    tpot_ms: tuple[float, ...]
    ttft_ms: tuple[float, ...]
    modes: Mapping[str, float] = field(default_factory=dict)
    pace: float = 1.0
    change: float | None = None

    @property
    def attainment(self) -> float | None:
        """Share of the requests that met the SLO; None without requests."""
        return self.good / self.requests if self.requests else None


@dataclass(frozen=True, slots=True)
class SloTarget:
    """A promise of the comparison.

    Attributes:
        label: as it was asked for, e.g. "1.5x" or "40ms".
        capacity_per_s: requests per second that serving alone can take under it; loads are shares of this.
    """

    label: str
    tpot_ms: float
    ttft_ms: float
    capacity_per_s: float


def build_report(
    results: Sequence[RunResult],
    targets: Sequence[SloTarget],
    *,
    trace: Mapping[str, Any],
    machine: Mapping[str, Any],
    simulated: bool,
    command: str,
    context: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``report.json``: one section for each SLO, and that of the first one also at the top.

    Args:
        results: in any order; an SLO or a load without results is left out.
        targets: at least one.
        trace: what was replayed.
        machine: what it ran on, or the device that was simulated.
        command: what to type to get this again.
        context: further entries for the top level, e.g. the model.
    """
    sections = {target.label: _section(results, target) for target in targets}
    first = sections[targets[0].label]
    goals = [goal for label, section in sections.items() for goal in judge(label, section)]
    return {
        "harli_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "simulated": simulated,
        "confidence": CONFIDENCE,
        **(context or {}),
        **first,
        "slos": sections,
        "goals": {goal.name: goal.as_json() for goal in goals},
        "trace": dict(trace),
        "machine": dict(machine),
    }


def _section(results: Sequence[RunResult], target: SloTarget) -> dict[str, Any]:
    mine = [result for result in results if result.slo == target.label]
    policies: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys(result.policy for result in mine):
        loads = sorted({result.load for result in mine if result.policy == policy})
        policies[policy] = {
            str(load): _cell([r for r in mine if r.policy == policy and r.load == load]) for load in loads
        }
    slo = {
        "label": target.label,
        "tpot_ms": round(target.tpot_ms, 3),
        "ttft_ms": round(target.ttft_ms, 3),
        "capacity_per_s": round(target.capacity_per_s, 4),
    }
    found = verdicts(policies, target.tpot_ms)
    return {
        "slo": slo,
        "policies": policies,
        "oracle_static": oracle_static(policies),
        "verdicts": {load: v.as_json() for load, v in found.items()},
    }


def _cell(runs: Sequence[RunResult]) -> dict[str, Any]:
    """All repetitions of one policy at one load. Attainment and percentiles are over all their requests."""
    runs = sorted(runs, key=lambda run: run.repetition)
    requests, good = sum(run.requests for run in runs), sum(run.good for run in runs)
    mean, half = interval([run.finetune_tokens_per_s for run in runs])
    share = share_interval(good, requests)
    modes = {mode for run in runs for mode in run.modes}
    return {
        "attainment": good / requests if requests else None,
        "attainment_ci": share and [round(end, 4) for end in share],
        "finetune_tokens_per_s": round(mean, 3),
        "finetune_tokens_per_s_ci": None if half is None else round(half, 3),
        "tpot_ms": percentiles([value for run in runs for value in run.tpot_ms]),
        "ttft_ms": percentiles([value for run in runs for value in run.ttft_ms]),
        "requests": requests,
        "failed": sum(run.failed for run in runs),
        "disturbed": sum((run.change or 1.0) > DISTURBED for run in runs),
        "modes": {
            mode: round(sum(run.modes.get(mode, 0.0) for run in runs) / len(runs), 4)
            for mode in sorted(modes)
        },
        "runs": [
            {
                "repetition": run.repetition,
                "requests": run.requests,
                "attainment": run.attainment,
                "finetune_tokens_per_s": round(run.finetune_tokens_per_s, 3),
                "tpot_ms": percentiles(run.tpot_ms),
                "pace": run.pace,
                "change": run.change,
            }
            for run in runs
        ],
    }
