"""The folder of a comparison: its plan, what was measured before the runs, and a file for each run.

Every file is written whole, so that a comparison that was interrupted goes on where it was. Knows files only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harli_appliance.bench.compare_plan import ComparePlan, Run
from harli_appliance.bench.comparison import RunResult, SloTarget
from harli_appliance.errors import ConfigError, UsageError

PLAN, BASIS, RUNS = "plan.json", "basis.json", "runs"


@dataclass(frozen=True, slots=True)
class Rung:
    """Serving alone at one rate: requests per second, and how many of them met each promise."""

    rate_per_s: float
    requests: int
    tpot_p99_ms: float | None
    ttft_p99_ms: float | None
    attainment: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Basis:
    """What loads and promises are relative to.

    Attributes:
        light_tpot_ms: p99 TPOT of serving alone, one request at a time.
        train_alone_tokens_per_s: finetuning with nobody to serve.
        probe_ms: what serving alone took per token in a few short answers, which every run is checked against.
    """

    light_tpot_ms: float
    train_alone_tokens_per_s: float
    targets: tuple[SloTarget, ...]
    ladder: tuple[Rung, ...]
    probe_ms: float

    @property
    def kept(self) -> set[str]:
        """Labels of the promises that serving alone keeps on this machine."""
        return {target.label for target in self.targets}


@dataclass(frozen=True, slots=True)
class Request:
    """What became of one request of a run; `at_s` is when it was due, after the start of the run."""

    at_s: float
    prompt_tokens: int
    tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    took_s: float
    met: bool
    counts: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Moment:
    """The appliance at one moment of a run, `at_s` after its start.

    Attributes:
        step_ms: median serving step since the moment before.
        training_tokens: trained since the moment before.
        leased: slots that training holds, of `slots`.
    """

    at_s: float
    mode: str
    running: int
    step_ms: float | None
    output_tokens: int
    training_tokens: int
    leased: int
    slots: int


@dataclass(frozen=True, slots=True)
class RunFile:
    result: RunResult
    requests: Sequence[Request]
    moments: Sequence[Moment]


class CompareStore:
    """The files of one comparison in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, plan: ComparePlan, *, resume: bool) -> None:
        """Keep the plan, or check that a resumed one is the same.

        Raises:
            UsageError: there is a comparison already, or none to resume, or another one.
            ConfigError: the folder cannot be written.
        """
        try:
            (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
            earlier = self._read(PLAN)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; choose another --out") from error
        if earlier is not None and not resume:
            raise UsageError(
                f"{self.folder} holds a comparison; --resume goes on with it, or choose another --out",
                param="out",
            )
        if earlier is None and resume:
            raise UsageError(
                f"{self.folder} holds no comparison to go on with; leave --resume out", param="resume"
            )
        if earlier is not None and (other := _differing(plan, earlier)):
            raise UsageError(
                f"the comparison in {self.folder} has another {', '.join(other)}; repeat its command with "
                "--resume, or choose another --out",
                param="resume",
            )
        self._write(PLAN, plan.model_dump(mode="json"))

    def plan(self) -> ComparePlan:
        return ComparePlan.model_validate(self._read(PLAN))

    def basis(self) -> Basis | None:
        """None before it was measured."""
        found = self._read(BASIS)
        if found is None:
            return None
        try:
            return Basis(
                found["light_tpot_ms"],
                found["train_alone_tokens_per_s"],
                tuple(SloTarget(**target) for target in found["targets"]),
                tuple(Rung(**rung) for rung in found["ladder"]),
                found["probe_ms"],
            )
        except (KeyError, TypeError) as error:
            path = self.folder / BASIS
            raise ConfigError(f"{path}: is of another version ({error}); choose another --out") from error

    def keep_basis(self, basis: Basis) -> None:
        self._write(BASIS, asdict(basis))

    def has(self, run: Run) -> bool:
        return (self.folder / RUNS / run.file).is_file()

    def keep(self, run: Run, found: RunFile) -> None:
        self._write(f"{RUNS}/{run.file}", asdict(found))

    def read(self, run: Run) -> RunFile | None:
        """None for a run that was not made yet."""
        found = self._read(f"{RUNS}/{run.file}")
        if found is None:
            return None
        result = found["result"]
        result |= {"tpot_ms": tuple(result["tpot_ms"]), "ttft_ms": tuple(result["ttft_ms"])}
        return RunFile(
            RunResult(**result),
            [Request(**request) for request in found["requests"]],
            [Moment(**moment) for moment in found["moments"]],
        )

    def _read(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"{path}: is damaged ({error}); remove it and resume") from error

    def _write(self, name: str, data: object) -> None:
        path = self.folder / name
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, path)


def _differing(plan: ComparePlan, earlier: object) -> list[str]:
    """Names of what is not the same. More policies may be asked for later; which parts of the trace are replayed
    depends on how many repetitions there are."""
    try:
        before = ComparePlan.model_validate(earlier)
    except ValidationError:
        return ["version"]
    names = [name for name in ComparePlan.model_fields if name != "policies"]
    return [name for name in names if getattr(plan, name) != getattr(before, name)]
