"""Deadlines of the requests in service, and what was kept of the promise.

A request's first token is due `ttft` after it arrived; token i after that is due `i * tpot` after the first, so
a request banks what it gained and is judged by its mean, as the promise is stated. Times are seconds of one
monotonic clock, passed in. Knows requests by id only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harli_appliance.scheduling.deadlines import Deadlines

WINDOW = 512
"""Recent samples that percentiles and attainment are taken over."""


@dataclass(slots=True)
class _Request:
    arrived: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    round: int = 0
    """Rounds (`SloTracker.decoded`) that had been when `tokens` and `last` were set."""


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


class SloTracker:
    """Follows every request from arrival to its last token.

    Args:
        tpot_ms, ttft_ms: the promise; may be changed at any time.
    """

    def __init__(self, tpot_ms: float, ttft_ms: float) -> None:
        self._tpot_ms = tpot_ms
        self._ttft_ms = ttft_ms
        self.tpot = Quantiles()
        self.itl = Quantiles()
        self.ttft = Quantiles()
        self.requests = 0
        self.failed = 0
        self._met: deque[bool] = deque(maxlen=WINDOW)
        self._live: dict[str, _Request] = {}
        self._rounds = 0
        self._round_at = 0.0
        self._schedule()

    @property
    def tpot_ms(self) -> float:
        return self._tpot_ms

    @tpot_ms.setter
    def tpot_ms(self, value: float) -> None:
        self._tpot_ms = value
        self._schedule()

    @property
    def ttft_ms(self) -> float:
        return self._ttft_ms

    @ttft_ms.setter
    def ttft_ms(self, value: float) -> None:
        self._ttft_ms = value
        self._schedule()

    def _schedule(self) -> None:
        """Every deadline anew, as the promise is now."""
        self._waiting = Deadlines(0.0)
        self._running = Deadlines(self._tpot_ms / 1e3)
        for name, entry in self._live.items():
            self._due(name, entry)

    def arrived(self, request: str, now: float) -> None:
        self.requests += 1
        self._live[request] = entry = _Request(now)
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
            self.ttft.add(1e3 * (now - entry.arrived))
            self._waiting.discard(request)
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
        self._running.put_off()

    def _settle(self, entry: _Request) -> None:
        """Write down the rounds that `entry` was in."""
        if entry.first is not None and entry.round < self._rounds:
            entry.tokens += self._rounds - entry.round
            entry.last = self._round_at
        entry.round = self._rounds

    def ended(self, request: str, how: Literal["finished", "aborted", "failed"]) -> RequestTiming | None:
        """Close a request. One whose client left counts neither as met nor as missed."""
        entry = self._live.pop(request, None)
        if entry is None:
            return None
        self._waiting.discard(request)
        self._running.discard(request)
        self._settle(entry)
        ttft = tpot = None
        if entry.first is not None and entry.last is not None:
            ttft = 1e3 * (entry.first - entry.arrived)
            if entry.tokens > 1:
                tpot = 1e3 * (entry.last - entry.first) / (entry.tokens - 1)
                self.tpot.add(tpot)
        self.failed += how == "failed"
        in_time = ttft is not None and ttft <= self.ttft_ms and (tpot is None or tpot <= self.tpot_ms)
        met = None if how == "aborted" else how == "finished" and in_time
        if met is not None:
            self._met.append(met)
        return RequestTiming(ttft, tpot, entry.tokens, met)

    def slack_ms(self, now: float) -> float:
        """Milliseconds until the earliest deadline; negative when it has passed, infinity with no request."""
        return (min(self._waiting.earliest(), self._running.earliest()) - now) * 1e3

    def _due(self, request: str, entry: _Request) -> None:
        if entry.first is None:
            self._waiting.set(request, entry.arrived + self._ttft_ms / 1e3)
        else:
            self._settle(entry)
            self._running.set(request, entry.first + entry.tokens * self._tpot_ms / 1e3)

    @property
    def attainment(self) -> float | None:
        return sum(self._met) / len(self._met) if self._met else None
