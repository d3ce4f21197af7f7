"""A trace through one simulated appliance, or through several behind a router that picks the least loaded.

Knows requests and when they come. Does not know what a step costs, nor policies.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.planner.server import SimulatedServer
from harli_appliance.scheduling.slo import RequestTiming


@dataclass(frozen=True, slots=True)
class FleetRun:
    """What came of a trace, after its lead.

    Attributes:
        requests: that arrived.
        ended: of these, the ones that were answered or refused.
        trained_tokens: until the last arrival, by all appliances together.
        modes: share of that time in each mode, over all appliances.
    """

    requests: int
    ended: Sequence[RequestTiming]
    trained_tokens: float
    modes: Mapping[str, float]


def replay(trace: Trace, servers: Sequence[SimulatedServer], lead_s: float = 0.0) -> FleetRun:
    """Send every request at its time to the appliance with the fewest requests in the house; wait for all answers.

    Args:
        lead_s: what arrives or is trained before does not count.
    """
    lead = {str(index): request for index, request in enumerate(trace.requests) if request.at_s < lead_s}
    counted = {str(index): request for index, request in enumerate(trace.requests) if request.at_s >= lead_s}
    _send(lead, servers, until=lead_s)
    before = _Totals(servers)
    _send(counted, servers, until=trace.duration_s)
    after = _Totals(servers)
    for server in servers:
        server.advance(math.inf)
    modes = {mode: time - before.modes[mode] for mode, time in after.modes.items()}
    seconds = sum(modes.values())
    return FleetRun(
        requests=len(counted),
        ended=[timing for server in servers for name, timing in server.ended if name in counted],
        trained_tokens=after.trained - before.trained,
        modes={mode: time / seconds for mode, time in modes.items() if time > 0.0},
    )


def _send(requests: Mapping[str, TraceRequest], servers: Sequence[SimulatedServer], until: float) -> None:
    for name, request in requests.items():
        for server in servers:
            server.advance(request.at_s)
        min(servers, key=_load).submit(name, request)
    for server in servers:
        server.advance(until)


class _Totals:
    """Of all appliances, so far."""

    def __init__(self, servers: Sequence[SimulatedServer]) -> None:
        self.trained = sum(server.training.trained for server in servers if server.training is not None)
        self.modes: defaultdict[str, float] = defaultdict(float)
        for server in servers:
            for mode, time in server.modes.items():
                self.modes[mode] += time


def _load(server: SimulatedServer) -> int:
    return server.load
