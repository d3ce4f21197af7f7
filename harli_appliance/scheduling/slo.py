"""Deadlines of the requests in service, and what was kept of the promise, for each class of requests.

A request's first token is due its class's `ttft` after it arrived; token i after that is due `i * tpot` after the
first, so a request banks what it gained and is judged by its mean, as the promise is stated. Times are seconds
of one monotonic clock, passed in. Knows requests by id only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harli_appliance.scheduling.answer_lengths import AnswerLengths
from harli_appliance.scheduling.deadlines import Deadlines
from harli_appliance.scheduling.types import Answering, Queue
from harli_appliance.schema import SloClass

WINDOW = 512
"""Recent samples that percentiles and attainment are taken over."""
PATIENCE = 0.5
"""Share of the time promised for its first token for which a prompt may be kept waiting for the sake of others."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a class of requests is promised, in milliseconds: time per output token, and to the first one."""

    tpot_ms: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """How a finished request went; milliseconds. `tpot_ms` is None for answers of fewer than two tokens,
    `met` (both targets) for a request whose client left."""

    ttft_ms: float | None
    tpot_ms: float | None
    tokens: int
    met: bool | None


class Quantiles:
    """Percentiles of the last `WINDOW` values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        self._values.append(value)

    def at(self, percent: float) -> float | None:
        return float(np.percentile(self._values, percent)) if self._values else None

    @property
    def last(self) -> float | None:
        return self._values[-1] if self._values else None


class Attainment:
    """Share of the last `WINDOW` requests that met their targets."""

    def __init__(self) -> None:
        self._met: deque[bool] = deque(maxlen=WINDOW)

    def add(self, met: bool) -> None:
        self._met.append(met)

    @property
    def share(self) -> float | None:
        return sum(self._met) / len(self._met) if self._met else None


class ClassLedger:
    """The requests of one class: their deadlines, and how those went that have ended."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.requests = 0
        self.live = 0
        self.tpot = Quantiles()
        self.ttft = Quantiles()
        self.attainment = Attainment()
        self.forget_deadlines()

    def forget_deadlines(self) -> None:
        self.waiting = Deadlines(0.0)
        self.running = Deadlines(self.target.tpot_ms / 1e3)


@dataclass(slots=True)
class _Request:
    ledger: ClassLedger
    arrived: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    round: int = 0
    """Rounds (`SloTracker.decoded`) that had been when `tokens` and `last` were set."""


class SloTracker:
    """Follows every request from arrival to its last token.

    Args:
        tpot_ms, ttft_ms: the promise to class ``standard``.
        others: the promise to other classes.
    """

    def __init__(
        self, tpot_ms: float, ttft_ms: float, others: Mapping[SloClass, Target] | None = None
    ) -> None:
        self.tpot = Quantiles()
        self.itl = Quantiles()
        self.ttft = Quantiles()
        self.requests = 0
        self.failed = 0
        self._attainment = Attainment()
        targets: dict[SloClass, Target] = {"standard": Target(tpot_ms, ttft_ms), **(others or {})}
        self.classes = {name: ClassLedger(target) for name, target in targets.items()}
        self._live: dict[str, _Request] = {}
        self._rounds = 0
        self._round_at = 0.0
        self._lengths = AnswerLengths()

    # -- the promise -----------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """The promise to class ``standard``; may be changed at any time."""
        return self.classes["standard"].target

    @target.setter
    def target(self, target: Target) -> None:
        ledger = self.classes["standard"]
        ledger.target = target
        ledger.forget_deadlines()
        for name, entry in self._live.items():
            if entry.ledger is ledger:
                self._due(name, entry)

    @property
    def tightest_tpot_ms(self) -> float:
        """The strictest promise per token to a request in service; class ``standard``'s without one."""
        live = (ledger.target.tpot_ms for ledger in self.classes.values() if ledger.live)
        return min(live, default=self.target.tpot_ms)

    @property
    def attainment(self) -> float | None:
        """Share of recent requests, of all classes, that met their targets."""
        return self._attainment.share

    def slack_ms(self, now: float) -> float:
        """Milliseconds until the earliest deadline; negative when it has passed, infinity with no request."""
        due = math.inf
        for ledger in self.classes.values():
            if ledger.live:
                due = min(due, ledger.waiting.earliest(), ledger.running.earliest())
        return (due - now) * 1e3

    def queue(self, now: float) -> Queue | None:
        """What waits and what a prompt would hold up; None when no request waits for its first token."""
        patience, waits = math.inf, False
        for ledger in self.classes.values():
            if ledger.waiting:
                waits = True
                kept = (1.0 - PATIENCE) * ledger.target.ttft_ms / 1e3
                patience = min(patience, ledger.waiting.earliest() - kept - now)
        return Queue(1e3 * patience, [*self._answering(now)]) if waits else None

    def _answering(self, now: float) -> Iterator[Answering]:
        for entry in self._live.values():
            if entry.first is not None:
                tokens = entry.tokens + self._rounds - entry.round
                tpot_ms = entry.ledger.target.tpot_ms
                slack_ms = 1e3 * (entry.first - now) + tokens * tpot_ms
                yield Answering(slack_ms, self._lengths.left(tokens), tpot_ms)

    # -- a request's life ------------------------------------------------------------------------------

    def arrived(self, request: str, now: float, slo_class: SloClass = "standard") -> None:
        """
        Raises:
            KeyError: no promise is known for this class.
        """
        ledger = self.classes[slo_class]
        self.requests += 1
        ledger.requests += 1
        ledger.live += 1
        self._live[request] = entry = _Request(ledger, now)
        self._due(request, entry)

    def produced(self, request: str, tokens: int, now: float) -> float | None:
        """Count tokens that a step brought; several in one step share its gap.

        Returns:
            The inter-token latency in milliseconds, None for a first token.
        """
        entry = self._live.get(request)
        if entry is None or tokens == 0:
            return None
        self._settle(entry)
        gap = None
        if entry.first is None:
            entry.first = now
            entry.ledger.waiting.discard(request)
            ttft = 1e3 * (now - entry.arrived)
            self.ttft.add(ttft)
            entry.ledger.ttft.add(ttft)
        elif entry.last is not None:
            gap = 1e3 * (now - entry.last) / tokens
            self.itl.add(gap)
        entry.last = now
        entry.tokens += tokens
        self._due(request, entry)
        return gap

    def decoded(self, now: float) -> None:
        """Count a token for every request that has its first one: a decode step in which all of them were, in
        one call whatever their number. Inter-token latencies are not noted."""
        self._rounds += 1
        self._round_at = now
        for ledger in self.classes.values():
            ledger.running.put_off()

    def ended(self, request: str, how: Literal["finished", "aborted", "failed"]) -> RequestTiming | None:
        """Close a request. One whose client left counts neither as met nor as missed."""
        entry = self._live.pop(request, None)
        if entry is None:
            return None
        ledger = entry.ledger
        ledger.live -= 1
        ledger.waiting.discard(request)
        ledger.running.discard(request)
        self._settle(entry)
        timing = _timing(entry, how)
        if how == "finished":
            self._lengths.add(entry.tokens)
        self.failed += how == "failed"
        if timing.tpot_ms is not None:
            self.tpot.add(timing.tpot_ms)
            ledger.tpot.add(timing.tpot_ms)
        if timing.met is not None:
            self._attainment.add(timing.met)
            ledger.attainment.add(timing.met)
        return timing

    def _settle(self, entry: _Request) -> None:
        """Write down the rounds that `entry` was in."""
        if entry.first is not None and entry.round < self._rounds:
            entry.tokens += self._rounds - entry.round
            entry.last = self._round_at
        entry.round = self._rounds

    def _due(self, request: str, entry: _Request) -> None:
        target = entry.ledger.target
        if entry.first is None:
            entry.ledger.waiting.set(request, entry.arrived + target.ttft_ms / 1e3)
        else:
            self._settle(entry)
            entry.ledger.running.set(request, entry.first + entry.tokens * target.tpot_ms / 1e3)


def _timing(entry: _Request, how: Literal["finished", "aborted", "failed"]) -> RequestTiming:
    ttft = tpot = None
    if entry.first is not None and entry.last is not None:
        ttft = 1e3 * (entry.first - entry.arrived)
        if entry.tokens > 1:
            tpot = 1e3 * (entry.last - entry.first) / (entry.tokens - 1)
    target = entry.ledger.target
    in_time = ttft is not None and ttft <= target.ttft_ms and (tpot is None or tpot <= target.tpot_ms)
    met = None if how == "aborted" else how == "finished" and in_time
    return RequestTiming(ttft, tpot, entry.tokens, met)
