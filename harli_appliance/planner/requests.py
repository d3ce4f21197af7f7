"""Requests in a simulated server: waiting, being read, being answered; and the slots they need.

Prompts come first, in chunks, in the order in which they arrived, as in SGLang; every running request then
gets one token a decode step. A request is admitted when its prompt and its whole answer fit into the slots,
so that none has to be taken back. Nothing here looks at each request of a step: what a step reads is kept as
sums, and who ends is on a heap. Knows no durations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from harli_appliance.bench.traces import TraceRequest
from harli_appliance.planner.device import StepWork
from harli_appliance.scheduling.types import Step


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the server.

    Attributes:
        chunk_tokens: prompt tokens of a step at most.
        running: requests decoded together at most.
        known_tokens: at the beginning of every prompt that the prefix cache holds: what a chat template adds, say.
    """

    chunk_tokens: int = 2048
    running: int = 256
    known_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """A prompt's share of a prefill step; `last` completes it."""

    name: str
    request: TraceRequest
    last: bool


class SimulatedRequests:
    """Args: slots: that serving may use at most."""

    def __init__(self, slots: int, limits: Limits) -> None:
        self.reserved = 0
        """Slots that admitted requests hold or will come to hold."""
        self.running = 0
        self._slots = slots
        self._limits = limits
        self._waiting: deque[tuple[str, TraceRequest]] = deque()
        self._reading: tuple[str, TraceRequest, int] | None = None
        self._parts: list[_Part] = []
        self._ends: list[tuple[int, str, int]] = []
        self._rounds = 0
        self._context = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (self._reading is not None)

    @property
    def present(self) -> int:
        return self.waiting + self.running

    @property
    def wanted(self) -> int:
        """Slots that admitted requests and the first one waiting need."""
        return self.reserved + (_slots(self._waiting[0][1]) if self._waiting else 0)

    def submit(self, name: str, request: TraceRequest) -> bool:
        """Queue a request; False when it could never be admitted."""
        if _slots(request) > self._slots:
            return False
        self._waiting.append((name, request))
        return True

    # -- a step ------------------------------------------------------------------------------------------

    def plan(self, make_room: Callable[[int], bool], *, prompts: bool = True) -> StepWork | None:
        """The next step, or None when nothing can run.

        Args:
            make_room: asked for a number of slots that serving needs in all; False when it cannot have them.
            prompts: whether prompts may be read while there are answers to go on with.
        """
        self._parts = []
        left, pairs, rows, read = self._limits.chunk_tokens, 0.0, 0, 0
        if not prompts and self.running:
            left = 0
        while left > 0 and (reading := self._reading or self._admit(make_room)) is not None:
            name, request, done = reading
            tokens = min(left, request.prompt_tokens - done)
            last = done + tokens == request.prompt_tokens
            self._parts.append(_Part(name, request, last))
            pairs += tokens * (done + tokens / 2)
            rows += done + tokens
            left -= tokens
            read += tokens
            self._reading = None if last else (name, request, done + tokens)
        if self._parts:
            step = Step("prefill", len(self._parts), rows, read)
            return StepWork(step, pairs)
        if self.running == 0:
            return None
        return StepWork(Step("decode", self.running, self._context), float(self._context))

    def complete(self) -> tuple[list[str], list[str]]:
        """The planned step is done: the names of those that have their first token, and of those that ended."""
        if self._parts:
            first = [part for part in self._parts if part.last]
            return [part.name for part in first], [name for part in first for name in self._start(part)]
        self._rounds += 1
        self._context += self.running
        ended = []
        while self._ends and self._ends[0][0] <= self._rounds:
            _, name, slots = heappop(self._ends)
            self._leave(slots)
            ended.append(name)
        return [], ended

    def join(self, make_room: Callable[[int], bool]) -> tuple[list[str], list[str]]:
        """Take in what waits as if it had been read elsewhere; the same names as `complete`."""
        joined, ended = [], []
        while (reading := self._admit(make_room)) is not None:
            joined.append(reading[0])
            ended += self._start(_Part(reading[0], reading[1], last=True))
        return joined, ended

    def _admit(self, make_room: Callable[[int], bool]) -> tuple[str, TraceRequest, int] | None:
        if not self._waiting or self.running + len(self._parts) >= self._limits.running:
            return None
        slots = _slots(self._waiting[0][1])
        if not make_room(self.reserved + slots):
            return None
        self.reserved += slots
        name, request = self._waiting.popleft()
        return name, request, min(self._limits.known_tokens, request.prompt_tokens - 1)

    def _start(self, part: _Part) -> list[str]:
        """A prompt is read, and its first token is there; its name when that was all."""
        request = part.request
        if request.output_tokens == 1:
            self.reserved -= _slots(request)
            return [part.name]
        self.running += 1
        self._context += request.prompt_tokens + 1
        heappush(self._ends, (self._rounds + request.output_tokens - 1, part.name, _slots(request)))
        return []

    def _leave(self, slots: int) -> None:
        self.running -= 1
        self.reserved -= slots
        self._context -= slots


def _slots(request: TraceRequest) -> int:
    return request.prompt_tokens + request.output_tokens
