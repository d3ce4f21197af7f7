"""What the requests of a trace need, period by period: the least that any schedule has to do for them.

Token i of a request is due i promised times per token after it arrived, as the scheduler counts it
(`scheduling.slo`), if the first one comes at once. Knows no device.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harli_appliance.bench.traces import Trace, TraceRequest

PERIOD_S = 0.5
"""Length of a period, if that makes no more than `PERIODS`."""
PERIODS = 120

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Demand:
    """What requests need, in each of the periods.

    Attributes:
        steps: that the fewest come to.
        tokens, rows: that are due.
        present: requests that may be there, and `present_rows` the rows that a step reads of them at most.
        busy_s: time in which there are any.
    """

    steps: Array
    tokens: Array
    rows: Array
    present: Array
    present_rows: Array
    busy_s: Array


def demand_of(trace: Trace, pace_s: float) -> Demand:
    """What is due until the end of the trace, at a token in `pace_s` seconds after the first one."""
    periods = max(1, min(PERIODS, int(trace.duration_s / PERIOD_S)))
    edges = np.linspace(0.0, trace.duration_s, periods + 1)
    found = Demand(*(np.zeros(periods) for _ in range(6)))
    busy_until = 0.0
    for request in sorted(trace.requests, key=lambda request: request.at_s):
        tokens = np.arange(1, request.output_tokens)
        due_s = request.at_s + pace_s * tokens
        if not len(tokens):
            continue
        in_time = due_s <= trace.duration_s
        period = np.minimum(np.searchsorted(edges, due_s[in_time]) - 1, periods - 1)
        np.add.at(found.tokens, period, 1.0)
        np.add.at(found.rows, period, request.prompt_tokens + tokens[in_time])
        there = (edges[1:] >= request.at_s) & (edges[:-1] <= due_s[-1])
        found.present[there] += 1.0
        found.present_rows[there] += request.prompt_tokens + len(tokens)
        begin_s = max(busy_until, request.at_s)
        busy_until = max(busy_until, float(due_s[-1]))
        found.busy_s[:] += np.maximum(
            0.0, np.minimum(edges[1:], busy_until) - np.maximum(edges[:-1], begin_s)
        )
    steps = latest_steps(trace.requests, pace_s, trace.duration_s)
    found.steps[:] = np.diff(np.searchsorted(steps, edges, side="right"))
    return found


def latest_steps(requests: Iterable[TraceRequest], pace_s: float, until_s: float) -> list[float]:
    """When steps have to be at the latest, if each serves all who are there.

    No schedule that is in time has fewer of them up to any moment: its n-th step is never after the n-th of these,
    at which some request would fall behind.
    """
    arriving = sorted(((request.at_s, request.output_tokens - 1) for request in requests), reverse=True)
    behind_first: list[tuple[float, int]] = []
    """Of those who are there, and the number of steps after which they have all tokens: when the next one is due,
    less `pace_s` for each step so far, which brings everybody's due time that much further."""
    steps: list[float] = []
    while True:
        while behind_first and behind_first[0][1] <= len(steps):
            heapq.heappop(behind_first)
        due_s = behind_first[0][0] + pace_s * len(steps) if behind_first else math.inf
        if arriving and arriving[-1][0] <= due_s:
            at_s, tokens = arriving.pop()
            if tokens > 0:
                heapq.heappush(behind_first, (at_s + pace_s - pace_s * len(steps), len(steps) + tokens))
        elif due_s <= until_s:
            steps.append(due_s)
        else:
            return steps
