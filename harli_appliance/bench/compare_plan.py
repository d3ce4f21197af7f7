"""What a comparison of policies is asked to do: promises, loads, the order of its runs.

Knows what a person writes on the command line and the files that keep it. Measures nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

from harli_appliance.bench.traces import Trace
from harli_appliance.bench.traces_read import load_trace
from harli_appliance.bench.traces_synthetic import Bursts, synthetic_trace
from harli_appliance.config import Settings
from harli_appliance.errors import UsageError
from harli_appliance.scheduling.names import POLICY_NAMES, check_policy

Replay = Literal["engine", "http"]
Item = TypeVar("Item")

SYNTHETIC_S = 600.0
SYNTHETIC_RATE_PER_S = 5.0
"""Thinned to each load, so only its bursts matter."""
_SLO = re.compile(r"(\d+(?:\.\d+)?)(ms|s|x)")


class SloAsked(BaseModel):
    """A promise as it was asked for: milliseconds, or a multiple of what serving alone takes at light load."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    tpot_ms: float | None = None
    factor: float | None = None

    def resolve(self, light_tpot_ms: float) -> float:
        """The promise in milliseconds."""
        return self.tpot_ms if self.tpot_ms is not None else (self.factor or 1.0) * light_tpot_ms


class ComparePlan(BaseModel):
    """Everything that decides what a comparison measures; a resumed one must have the same.

    Attributes:
        trace: a file; None for the synthetic trace.
        loads: percent of the capacity under each SLO.
        seconds: of a run in which arriving requests count, after `lead_s` in which they do not.
        grace_s: how long answers may take after that, at least; see `grace_of`.
        ladder_requests: of each rate that is tried to find the capacity, as far as the limits of a rung's time
            allow.
        light_requests: served one by one, to find what serving takes alone.
        train_alone_s: how long training is measured alone.
        min_output_tokens: answers that scaling would make shorter have so many. The time per token of an answer of
            a few tokens is that of one prompt that came in between, whoever serves.
        variation: of the rate of the synthetic trace.
        sequence_tokens: of a micro-batch of the finetuning job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policies: tuple[str, ...]
    slos: tuple[SloAsked, ...]
    model: str
    trace: Path | None = None
    skip_bad: bool = False
    replay: Replay = "engine"
    ttft_ms: float = 5_000.0
    loads: tuple[int, ...] = (30, 60, 90)
    repetitions: int = 3
    seconds: float = 36.0
    lead_s: float = 4.0
    grace_s: float = 10.0
    ladder_requests: int = 14
    shortest_rung_s: float = 12.0
    longest_rung_s: float = 40.0
    most_rungs: int = 12
    light_requests: int = 12
    train_alone_s: float = 10.0
    prompt_scale: float = 0.04
    output_scale: float = 0.25
    max_prompt_tokens: int = 128
    min_output_tokens: int = 16
    max_output_tokens: int = 64
    variation: float = 1.0
    sequence_tokens: int = 128
    seed: int = 7

    def grace_of(self, tpot_ms: float) -> float:
        """Seconds that answers may take after the last request; those still under way then have failed. The
        longest one that keeps its promise has not."""
        return max(self.grace_s, (self.ttft_ms + self.max_output_tokens * tpot_ms) / 1e3)

    def load_trace(self) -> Trace:
        """The trace with its lengths scaled and capped.

        Raises:
            UsageError: it cannot be read, has a bad row, or is too short for one run.
        """
        if self.trace is not None:
            trace = load_trace(self.trace, skip_bad=self.skip_bad)
        else:
            bursts = Bursts(SYNTHETIC_RATE_PER_S, variation=self.variation)
            trace = synthetic_trace(SYNTHETIC_S, self.seed, bursts)
        if trace.duration_s < self.length_s:
            raise UsageError(
                f"{trace.name} is {trace.duration_s:.0f} s long, a run takes {self.length_s:.0f} s; "
                "lower --seconds",
                param="trace",
            )
        if not trace.requests:
            raise UsageError("the trace has no requests; lower --variation", param="variation")
        return trace.with_lengths(
            prompt_scale=self.prompt_scale,
            output_scale=self.output_scale,
            max_prompt_tokens=self.max_prompt_tokens,
            min_output_tokens=self.min_output_tokens,
            max_output_tokens=self.max_output_tokens,
        )

    def appliance_settings(self, folder: Path, settings: Settings) -> dict[str, dict[str, str | int]]:
        """Of the appliance that is measured, as sections of ``harli.toml``.

        Args:
            folder: the model's.
            settings: a person's, of which it takes over what the machine may need.
        """
        needed: dict[str, dict[str, str | int | None]] = {
            "device": {
                "attention": settings.device.attention,
                "graphs": None if settings.device.graphs else False,
            },
            "memory": {"pool_slots": settings.memory.pool_slots},
        }
        set_ = {
            section: {name: value for name, value in values.items() if value is not None}
            for section, values in needed.items()
        }
        return {
            "model": {"path": str(folder), "served_name": folder.name},
            "training": {"sequence_tokens": self.sequence_tokens},
            **{section: values for section, values in set_.items() if values},
        }

    @property
    def length_s(self) -> float:
        """Of the stretch of the trace that one run replays."""
        return self.lead_s + self.seconds

    def runs(self, slos: Container[str] | None = None) -> Iterator[Run]:
        """Every run, or those of the promises with these labels, in the order in which they are made: all policies
        of a load one after the other, beginning with another one each time, so that a machine that becomes slower
        or faster does so for all of them."""
        turn = 0
        for repetition in range(self.repetitions):
            for slo in self.slos:
                if slos is not None and slo.label not in slos:
                    continue
                for load in self.loads:
                    start = turn % len(self.policies)
                    turn += 1
                    for policy in self.policies[start:] + self.policies[:start]:
                        yield Run(slo.label, load, repetition, policy)


@dataclass(frozen=True, slots=True)
class Run:
    """Which run of a plan."""

    slo: str
    load: int
    repetition: int
    policy: str

    @property
    def file(self) -> str:
        """Name of the file that keeps what it found."""
        policy = self.policy.replace(":", "-")
        return f"{self.slo}_{self.load:03d}_{self.repetition}_{policy}.json"

    @property
    def title(self) -> str:
        return f"{self.policy}, {self.slo}, load {self.load}%, repetition {self.repetition + 1}"


def stretch(
    trace: Trace, plan: ComparePlan, rate_per_s: float, repetition: int, length_s: float | None = None
) -> Trace:
    """What a run replays: the repetition's own part of the trace, with exactly as many requests as the rate asks
    for. A lower rate has a part of the requests of a higher one, at the same times."""
    length_s = length_s or plan.length_s
    room = trace.duration_s - length_s
    start = max(0.0, room * (repetition + 0.5) / plan.repetitions)
    part = trace.window(start, length_s)
    return part.with_count(max(1, round(rate_per_s * length_s)), plan.seed + repetition)


# -- what a person writes ----------------------------------------------------------------------------


def parse_policies(text: str) -> tuple[str, ...]:
    """
    Raises:
        UsageError: an unknown name, with the known ones, or one that is there twice.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError(f"--policies names none; choose from {', '.join(POLICY_NAMES)}", param="policies")
    for name in names:
        try:
            check_policy(name)
        except UsageError:
            known = ", ".join(POLICY_NAMES)
            raise UsageError(f"no policy '{name}'; choose from {known}", param="policies") from None
    return _distinct("policies", names)


def parse_slos(text: str) -> tuple[SloAsked, ...]:
    """
    Raises:
        UsageError: something that is neither a time nor a multiple.
    """
    found: list[SloAsked] = []
    for part in (part.strip() for part in text.split(",")):
        match = _SLO.fullmatch(part)
        value = float(match[1]) if match else 0.0
        if match is None or value <= 0:
            raise UsageError(
                f"--slo-tpot '{part}': write a time such as 40ms or a multiple of serving alone such as 1.5x",
                param="slo_tpot",
            )
        if match[2] == "x":
            found.append(SloAsked(label=part, factor=value))
        else:
            found.append(SloAsked(label=part, tpot_ms=value * (1e3 if match[2] == "s" else 1.0)))
    _distinct("slo-tpot", [slo.label for slo in found])
    return tuple(found)


def parse_loads(text: str) -> tuple[int, ...]:
    """Shares of the capacity as whole percents.

    Raises:
        UsageError: not a number in (0, 2].
    """
    found: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0.01 <= share <= 2.0:
            raise UsageError(
                f"--loads '{part}': write shares of what can be served, e.g. 0.3,0.6,0.9", param="loads"
            )
        found.append(round(100 * share))
    return tuple(sorted(_distinct("loads", found)))


def parse_milliseconds(name: str, text: str) -> float:
    """
    Raises:
        UsageError: no time such as 800ms or 5s.
    """
    match = _SLO.fullmatch(text.strip())
    if match is None or match[2] == "x" or float(match[1]) <= 0:
        raise UsageError(f"--{name} '{text}': write a time such as 800ms or 5s", param=name)
    return float(match[1]) * (1e3 if match[2] == "s" else 1.0)


def parse_replay(text: str) -> Replay:
    """
    Raises:
        UsageError: neither of the two ways.
    """
    for way in get_args(Replay):
        if text == way:
            return way  # type: ignore[no-any-return]
    raise UsageError(f"--replay '{text}': choose engine or http", param="replay")


def without_folders(command: str) -> str:
    """A command for a report that is shown to others: files by name, wherever they lie here."""
    words = []
    for word in shlex.split(command):
        flag, separator, value = word.partition("=")
        is_flag = bool(separator) and flag.startswith("-")
        path = value if is_flag else word
        name = Path(path).name if "/" in path else path
        words.append(f"{flag}={name}" if is_flag else name)
    return shlex.join(words)


def _distinct(name: str, found: Sequence[Item]) -> tuple[Item, ...]:
    for item in found:
        if list(found).count(item) > 1:
            raise UsageError(f"--{name}: {item} is there twice", param=name)
    return tuple(found)
