"""A job that runs: its run, where its adapter's state lives, what its next turn begins with, and its pace.

Lives on the event loop. Knows nothing of the other jobs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from harli_appliance.api.ports import Job
from harli_appliance.training.job_run import JobRun
from harli_appliance.training.residence import Residence
from harli_appliance.training.units import MicroBatch


@dataclass(frozen=True, slots=True)
class RunningJob:
    """What people are shown of a running job.

    Attributes:
        share: its part of the recent device time of training, in [0, 1].
        remaining_s: seconds to its end at the pace since it began or was resumed; None before a step was made.
    """

    id: str
    step: int
    total_steps: int
    loss: float | None
    share: float
    remaining_s: float | None


@dataclass(slots=True)
class Spent:
    """What would be done again.

    Attributes:
        took_ms: time of the units that ran.
        credited: trained tokens that they counted for.
    """

    took_ms: float = 0.0
    credited: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.took_ms + other.took_ms, self.credited + other.credited)


@dataclass(slots=True)
class Unfinished:
    """A micro-batch on its way."""

    batch: MicroBatch
    spent: Spent = field(default_factory=Spent)


class ActiveJob:
    def __init__(self, job: Job, run: JobRun, residence: Residence) -> None:
        self.job = job
        self.run = run
        self.residence = residence
        self.index = 0
        """Of the next micro-batch; one past the last when the optimizer's step is next."""
        self.spent = Spent()
        """On the micro-batches of the step under way that are complete."""
        self.unfinished: Unfinished | None = None
        """What the next turn goes on with; it lies in host memory."""
        self.refused = False
        """Whether the disk refuses what is to be kept of it, which was told."""
        self._blocked_until = 0.0
        self._began = time.monotonic()
        self._first_step = run.step

    def block(self, seconds: float) -> None:
        """Nothing can be done for it now."""
        self._blocked_until = time.monotonic() + seconds

    @property
    def blocked(self) -> bool:
        return time.monotonic() < self._blocked_until

    def shown(self, share: float) -> RunningJob:
        run = self.run
        return RunningJob(self.job.id, run.step, run.total_steps, run.loss, share, self._remaining_s())

    def _remaining_s(self) -> float | None:
        made = self.run.step - self._first_step
        if made == 0:
            return None
        return (self.run.total_steps - self.run.step) * (time.monotonic() - self._began) / made
