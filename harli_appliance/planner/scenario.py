"""One simulated run from its description: which device, policy, promise and trace; and its result.

Everything in a `Scenario` can be sent to another process. Knows how a simulated appliance is put together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harli_appliance.bench.comparison import RunResult
from harli_appliance.bench.traces import Trace
from harli_appliance.planner.device import Device
from harli_appliance.planner.fleet import FleetRun, replay
from harli_appliance.planner.requests import Limits
from harli_appliance.planner.server import SimulatedServer
from harli_appliance.planner.teach import taught
from harli_appliance.planner.training import SimulatedTraining
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker

SERVE_ONLY = "serve_only"


@dataclass(frozen=True, slots=True)
class Fleet:
    """The appliances of a plan, all alike.

    Attributes:
        micro_batch_tokens: of the finetuning job that each of them runs.
        decode_only: prompts are read elsewhere.
    """

    device: Device
    replicas: int = 1
    limits: Limits = field(default_factory=Limits)
    micro_batch_tokens: int = 2048
    decode_only: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """Attributes:
    lead_s: of the trace, in which nothing counts: policies learn in it.
    slo, load, repetition: as in `RunResult`.
    since_s: time of the device's at which the run begins; some time of the day where none is given.
    """

    fleet: Fleet
    policy: str
    trace: Trace
    slo: str
    tpot_ms: float
    ttft_ms: float
    load: int
    repetition: int
    lead_s: float = 0.0
    since_s: float | None = None


def run(scenario: Scenario) -> RunResult:
    """Simulate it; the same scenario gives the same result.

    Raises:
        UsageError: there is no such policy, or the device has no such split.
    """
    fleet = scenario.fleet
    servers = [_server(scenario, seed) for seed in range(fleet.replicas)]
    return _result(scenario, replay(scenario.trace, servers, scenario.lead_s))


def _server(scenario: Scenario, seed: int) -> SimulatedServer:
    fleet, device = scenario.fleet, scenario.fleet.device
    number = scenario.repetition * fleet.replicas + seed
    predictor, training = Predictor(), None
    if scenario.policy != SERVE_ONLY:
        predictor = taught(device, chunk_tokens=fleet.limits.chunk_tokens, seed=number)
        training = SimulatedTraining(device, fleet.micro_batch_tokens)
    return SimulatedServer(
        device,
        Scheduler(predictor, scenario.policy, device.splits),
        SloTracker(scenario.tpot_ms, scenario.ttft_ms),
        training,
        limits=fleet.limits,
        seed=number,
        decode_only=fleet.decode_only,
        since_s=scenario.since_s,
    )


def _result(scenario: Scenario, run: FleetRun) -> RunResult:
    answered = [timing for timing in run.ended if timing.ttft_ms is not None]
    duration_s = scenario.trace.duration_s - scenario.lead_s
    return RunResult(
        policy=scenario.policy,
        slo=scenario.slo,
        load=scenario.load,
        repetition=scenario.repetition,
        requests=run.requests,
        good=sum(timing.met is True for timing in answered),
        failed=run.requests - len(answered),
        finetune_tokens_per_s=run.trained_tokens / duration_s if duration_s > 0 else 0.0,
        tpot_ms=tuple(timing.tpot_ms for timing in answered if timing.tpot_ms is not None),
        ttft_ms=tuple(timing.ttft_ms for timing in answered if timing.ttft_ms is not None),
        modes=run.modes,
    )
