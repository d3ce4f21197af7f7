"""What the dashboard shows, and how it gets it: the status, and the last two minutes of the timeline.

Knows the client and the wire types. Does not know widgets. An appliance that cannot be reached is a state to
show, not an error: the feed says why and goes on asking.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field

from harli_appliance.client import HarliClient
from harli_appliance.errors import HarliError, NotReady
from harli_appliance.schema import Sample, Status

WINDOW_S = 120.0
"""How far back the plots go."""

LIVE_S = 3.0
"""What counts as now: long enough to read the number, short enough to see a breach."""

Points = tuple[list[float], list[float]]
"""Seconds from now (0 is now, -10 ten seconds ago), and values."""


@dataclass(slots=True)
class History:
    """The samples of the window. Their clock is the appliance's, so the offset to ours is remembered."""

    samples: deque[Sample] = field(default_factory=deque)
    offset_s: float = 0.0

    def add(self, samples: list[Sample], now: float) -> None:
        if samples:
            self.offset_s = now - samples[-1].t
            self.samples.extend(samples)
        self.forget(now)

    def forget(self, now: float) -> None:
        while self.samples and self._ago(self.samples[0], now) < -WINDOW_S:
            self.samples.popleft()

    def _ago(self, sample: Sample, now: float) -> float:
        return sample.t + self.offset_s - now

    def tpot(self, now: float) -> list[Points]:
        """Inter-token latency in ms, one run of points for each stretch in which tokens were served."""
        runs: list[Points] = []
        open_run = False
        for sample in self.samples:
            if sample.tpot_ms is None:
                open_run = False
                continue
            if not open_run:
                runs.append(([], []))
                open_run = True
            runs[-1][0].append(self._ago(sample, now))
            runs[-1][1].append(sample.tpot_ms)
        return runs

    def live_tpot(self, now: float) -> float | None:
        """The inter-token latency of now in ms (median of `LIVE_S`); None when no token was served lately."""
        recent = [
            sample.tpot_ms
            for sample in self.samples
            if sample.tpot_ms is not None and self._ago(sample, now) >= -LIVE_S
        ]
        return statistics.median(recent) if recent else None

    def served_per_s(self, now: float) -> Points:
        return self._per_s(now, [(sample, sample.output_tokens) for sample in self.samples])

    def trained_per_s(self, now: float) -> Points:
        return self._per_s(now, [(sample, sample.training_tokens) for sample in self.samples])

    def _per_s(self, now: float, counts: list[tuple[Sample, int]]) -> Points:
        """Tokens of each second, averaged over the two seconds around it: units of work end in jumps."""
        seconds = int(WINDOW_S)
        totals = [0.0] * seconds
        for sample, count in counts:
            index = seconds - 1 + int(self._ago(sample, now))
            if 0 <= index < seconds:
                totals[index] += count
        first = self._first_second(now, seconds)
        xs = [float(index - seconds + 1) for index in range(first, seconds)]
        ys = [
            sum(totals[max(first, index - 2) : index + 1]) / len(totals[max(first, index - 2) : index + 1])
            for index in range(first, seconds)
        ]
        return xs, ys

    def _first_second(self, now: float, seconds: int) -> int:
        """Nothing is known from before the first sample, which is not the same as zero."""
        if not self.samples:
            return seconds
        return max(0, seconds - 1 + int(self._ago(self.samples[0], now)))


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the appliance: its status, or why there is none.

    Attributes:
        answers: whether something answered; it is starting or stopping when there is no status.
    """

    status: Status | None
    trouble: str | None
    answers: bool
    history: History
    now: float


class Feed:
    """Reads an appliance again and again; use inside ``async with client``."""

    def __init__(self, client: HarliClient) -> None:
        self.client = client
        self.history = History()
        self._next = 0
        self._uptime_s = 0.0

    async def read(self) -> Reading:
        try:
            status = await self.client.status()
            if status.uptime_s < self._uptime_s:  # it was started again, and its timeline with it
                self._next, self.history = 0, History()
            self._uptime_s = status.uptime_s
            timeline = await self.client.timeline(self._next)
        except HarliError as error:
            self.history.forget(time.time())
            return Reading(None, error.message, isinstance(error, NotReady), self.history, time.time())
        self._next = timeline.next
        self.history.add(timeline.samples, time.time())
        return Reading(status, None, True, self.history, time.time())
