"""How numbers and states are said, in the dashboard and in its text snapshot alike."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from harli_appliance.scheduling.reasons import in_words
from harli_appliance.schema import JobView, PoolView, SloView, Status, TrainingView
from harli_appliance.tui.bars import Share

Verdict = Literal["success", "warning", "error"]

NEAR_TARGET = 0.9
"""From this share of the target on, a latency is worth a look."""

LEAST_ATTAINMENT = 0.99

MODES = {
    "idle": "idle",
    "pause": "serving, training waits",
    "time_slice": "taking turns",
    "partition": "both at once",
    "fused": "in one step",
    "training": "training only",
}

BAR_CELLS = 10
GIB = 1 << 30

NAME_CELLS = 8
"""As many as the name of a job's adapter ends in."""


def verdict(value: float | None, target: float) -> Verdict | None:
    """Whether a latency keeps its promise; None when there is none."""
    if value is None:
        return None
    if value > target:
        return "error"
    return "warning" if value > NEAR_TARGET * target else "success"


def attainment_verdict(attainment: float | None) -> Verdict | None:
    if attainment is None:
        return None
    return "success" if attainment >= LEAST_ATTAINMENT else "error"


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"


def mode(status: Status) -> str:
    return f"{MODES[status.mode]} · {in_words(status.reason)}"


def classes(slo: SloView) -> str:
    """What was kept of the promise to each class that had requests; nothing where all are of one class."""
    seen = [part for part in slo.classes if part.requests]
    if len(seen) < 2:
        return ""
    return ", ".join(f"{part.name} {percent(part.attainment)}" for part in seen)


def clock(seconds: float) -> str:
    """A moment in the time of this machine, to the second."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%H:%M:%S")


def running_jobs(training: TrainingView) -> str:
    """The loss of the only running job, or how many there are."""
    if len(training.running) == 1:
        loss = training.running[0].loss
        return "" if loss is None else f"loss {loss:.3f}"
    return f"{len(training.running)} jobs take turns" if training.running else ""


def job_name(job_id: str) -> str:
    """Enough of an id to know it again, and for the command line to find it."""
    kind, _, number = job_id.partition("-")
    return job_id if len(number) <= NAME_CELLS else f"{kind}-…{number[-NAME_CELLS:]}"


def hardware(status: Status) -> str:
    """What the device tells of itself, in one line; nothing while it tells nothing."""
    read = status.hardware
    if read is None:
        return ""
    parts = [
        f"{name} {value:.0%}"
        for name, value in (("busy", read.compute), ("tensor", read.tensor), ("bandwidth", read.bandwidth))
        if value is not None
    ]
    if read.memory_bytes is not None:
        parts.append(f"{read.memory_bytes / GIB:.1f} GiB")
    if read.power_w is not None:
        parts.append(f"{read.power_w:.0f} W")
    if read.temperature_c is not None:
        parts.append(f"{read.temperature_c:.0f} °C")
    return " · ".join(parts)


def cancelling(job: JobView) -> str:
    """What cancelling a job would mean."""
    if not job.step:
        return f"{job.id} is {job.status} and has made no step yet."
    return (
        f"{job.id} is {job.status}; its {job.step} of {job.total_steps} steps are lost.\n"
        "Space pauses it instead and keeps them."
    )


def progress(job: JobView) -> str:
    """A small bar and the steps; nothing before the number of steps is known."""
    if not job.total_steps:
        return ""
    full = round(BAR_CELLS * min(job.step, job.total_steps) / job.total_steps)
    return f"{'━' * full}{'╌' * (BAR_CELLS - full)} {job.step}/{job.total_steps}"


def pool_shares(pool: PoolView, colours: dict[str, str]) -> list[Share]:
    sizes = {"serving": pool.serving, "cached": pool.cached, "leased": pool.leased, "free": pool.free}
    return [Share(name, size, colours[name], f"{size:,}") for name, size in sizes.items()]


def partition_shares(status: Status, colours: dict[str, str]) -> list[Share]:
    part = status.partition
    share = min(max(part.inference_share, 0.0), 1.0)
    return [
        Share("inference", share, colours["serving"], part.inference),
        Share("training", 1.0 - share, colours["leased"], part.training),
    ]
