"""One simulated appliance: the real scheduler, predictor and SLO tracker, ticking on a simulated device and
clock.

A tick goes as the engine's does (`engine.engine`): plan, decide, let both lanes do what was decided for as
long as the device says, collect, observe. What takes time gets a little noise, so that bounds have something
to bound. Seeded: the same arguments give the same run. Knows no trace and no router.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Literal

from harli_appliance.bench.traces import TraceRequest
from harli_appliance.planner.device import Device, StepWork
from harli_appliance.planner.requests import Limits, SimulatedRequests
from harli_appliance.planner.training import SimulatedTraining
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import RequestTiming, SloTracker
from harli_appliance.scheduling.types import UNLIMITED, Decision, Outlook, Split

WATERMARK = 0.1
"""Share of the slots that training never leases, as in `memory.watermark`."""
MIXED = 0.1
"""A step that waited for a unit for more than this share of it is neither solo nor co-run: nothing is
learned."""
A_DAY_S = 86_400.0
MOMENT_S = 0.25
"""For so long a device's pace is taken to stay what it is, while nothing is served."""
NOTHING = Outlook(ready=False)
WHOLE = Split("whole", 0.0, 1.0)
"""Training has the device to itself."""


class SimulatedServer:
    """Args:
    training: None for an appliance without a job, which then has nothing to learn for either.
    decode_only: prompts are read elsewhere: requests arrive with their first token and their K and V.
    since_s: time of the device's at which the run begins; some time of the day where none is given.
    """

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        slo: SloTracker,
        training: SimulatedTraining | None,
        *,
        limits: Limits,
        seed: int,
        decode_only: bool = False,
        since_s: float | None = None,
    ) -> None:
        self.now = 0.0
        self.ended: list[tuple[str, RequestTiming]] = []
        """Every request that was answered or refused, by name."""
        self.modes: defaultdict[str, float] = defaultdict(float)
        """Seconds in each mode."""
        self.training = training
        self._device = device
        self._scheduler = scheduler
        self._slo = slo
        self._requests = SimulatedRequests(device.slots, limits)
        self._decode_only = decode_only
        self._random = random.Random(seed)
        self._since_s = since_s if since_s is not None else A_DAY_S * self._random.random()
        self._watermark = int(WATERMARK * device.slots)
        self._pace = 1.0
        self._beside: Split | None = None
        """Where a unit was under way when the last step ended; None when none was."""

    @property
    def load(self) -> int:
        """Requests in the house; what a router looks at."""
        return self._requests.present

    def submit(self, name: str, request: TraceRequest) -> None:
        """A request arrives now, or while the step in progress runs."""
        self._slo.arrived(name, request.at_s)
        if not self._requests.submit(name, request):
            self._close(name, "failed")

    def _close(self, name: str, how: Literal["finished", "failed"]) -> None:
        timing = self._slo.ended(name, how)
        if timing is not None and timing.met is not None:
            self._scheduler.ended(timing.met)
            self.ended.append((name, timing))

    def advance(self, until: float) -> None:
        """Go on until `until` or a little later: a step that began before ends after it."""
        while self.now < until:
            if math.isinf(until) and (self._requests.present == 0 or self._held()):
                return
            self._tick(until)

    def _held(self) -> bool:
        """Whether requests wait for training to end, which it never does here."""
        if self.training is None:
            return False
        return self._scheduler.admits(self._slo.queue(self.now), self.training.outlook()) == "none"

    # -- a tick ------------------------------------------------------------------------------------------

    def _tick(self, until: float) -> None:
        started, training = self.now, self.training
        self._pace = self._device.pace(self._since_s + started)
        if training is not None and not training.leased:
            training.leased = self._requests.wanted + training.slots + self._watermark <= self._device.slots
        outlook = training.outlook() if training is not None else NOTHING
        admits = self._scheduler.admits(self._slo.queue(self.now), outlook)
        if admits != "none" and self._decode_only:
            self._deliver(*self._requests.join(self._make_room))
        work = self._requests.plan(self._make_room, prompts=admits == "all") if admits != "none" else None
        if training is not None and outlook.ready and not training.leased:
            outlook = training.outlook()  # planning took its slots back
        slack = self._slo.slack_ms(self.now)
        step = work.step if work is not None else None
        decision = self._scheduler.decide(step, slack, self._slo.tightest_tpot_ms, outlook)
        if work is not None:
            self._serve(work, decision)
        else:
            self._without_serving(decision, until)
        self.modes[decision.mode] += self.now - started

    def _make_room(self, needed: int) -> bool:
        """Serving needs `needed` slots in all: training gives its own back where they are not there
        otherwise."""
        slots, training = self._device.slots, self.training
        if training is not None and training.leased and needed + training.slots > slots:
            if not self._scheduler.elastic:
                training.end_after_this()
                return False
            training.drop()
        return needed <= slots

    def _without_serving(self, decision: Decision, until: float) -> None:
        """Nothing is served until the next arrival, or until training gives back what serving waits for."""
        if self.training is not None and decision.units:
            rate = self._device.training_rate() / self._pace
            until = min(until, self.now + MOMENT_S, self.now + self.training.left / rate)
            self._train(self.training, rate * (until - self.now), rate)
            self._beside = WHOLE
        self.now = until

    def _serve(self, work: StepWork, decision: Decision) -> None:
        training, device = self.training, self._device
        mode, split, step = decision.mode, decision.split, work.step
        noise = self._pace * device.noise(self._random)
        tokens = decision.fused_tokens if mode == "fused" else 0
        if mode == "partition":
            took = device.corun_ms(work, split) * noise
        elif tokens:
            took = device.fused_ms(work, tokens) * noise
        else:
            took = device.solo_ms(work) * noise
        delay = self._delay(work, took, split if mode == "partition" else None, tokens)
        self.now += (took + delay) / 1e3
        self._deliver(*self._requests.complete(), everybody=step.kind == "decode")
        if training is not None and decision.units:
            if mode == "partition":
                self._train_beside(training, decision, (took + delay) / 1e3)
            elif mode == "time_slice":
                self._train_alone(training, decision.units)
        if training is not None and mode == "fused":
            training.forward(min(decision.fused_tokens, training.forward_tokens_left))
        if training is not None and decision.after:
            self._end_unit(training)
            self._train_alone(training, decision.after)
        if training is not None and (mode == "partition" or delay < MIXED * took):
            self._scheduler.observe(
                step,
                took + delay,
                corun=mode == "partition",
                split=split if mode == "partition" else None,
                fused_tokens=decision.fused_tokens if mode == "fused" else 0,
            )

    def _train_beside(self, training: SimulatedTraining, decision: Decision, seconds: float) -> None:
        rate = self._device.corun_training_rate(decision.split) / self._pace
        amount = rate * seconds
        if decision.units < UNLIMITED:  # so many are waited for, also when the step is over before
            amount = training.amount_of(decision.units)
            self.now += max(0.0, amount / rate - seconds)
            seconds = amount / rate
        self._train(training, amount, rate)
        self._scheduler.predictor.observe_training(amount, seconds, decision.split)
        self._beside = decision.split or WHOLE

    def _end_unit(self, training: SimulatedTraining) -> None:
        """The unit that is under way on a part of the device ends, before training has all of it."""
        split, self._beside = self._beside, None
        if split is not None:
            amount = self._random.random() * training.amount_of(1)
            training.run(amount)
            self.now += amount / self._device.training_rate(split)

    def _train_alone(self, training: SimulatedTraining, units: int) -> None:
        """A slice: on the whole device, after the step, to the end of its last unit."""
        amount = training.amount_of(units)
        rate = self._device.training_rate() / self._pace
        seconds = amount / rate
        self._train(training, amount, rate)
        self.now += seconds
        if self._device.splits:  # elsewhere None stands for the one way of running beside serving
            self._scheduler.predictor.observe_training(amount, seconds)

    def _train(self, training: SimulatedTraining, amount: float, rate: float) -> None:
        training.run(amount)
        if (
            not self._device.splits
        ):  # elsewhere policies want to know how long a unit takes on the whole device
            training.went(amount, rate)

    def _delay(self, work: StepWork, took_ms: float, split: Split | None, fused_tokens: int) -> float:
        """Milliseconds that a step loses to the unit under way on SMs that it wants now: until that ends, after
        half of its time on average, the step has those that serving had before.

        A unit beside which no other follows ends meanwhile.
        """
        before, self._beside = self._beside, None
        device, training = self._device, self.training
        if before is None or before == split or training is None or not device.splits:
            return 0.0
        left = self._random.random()
        if split is None:
            training.run(left * training.amount_of(1))
        left_ms = left * training.unit_ms * device.training_rate() / device.training_rate(before)
        if before.inference == 0.0:
            return left_ms
        slow_ms = device.corun_ms(work, before)
        if fused_tokens:
            slow_ms = max(slow_ms, device.fused_ms(work, fused_tokens, before))
        slow_ms *= self._pace
        return min(left_ms, slow_ms) * max(0.0, 1.0 - took_ms / slow_ms)

    def _deliver(self, first: list[str], ended: list[str], *, everybody: bool = False) -> None:
        """Hand out tokens.

        Args:
            first: requests whose first token this is.
            ended: requests whose last token this is.
            everybody: whether all running requests got one, as they do in a decode step.
        """
        for name in first:
            self._slo.produced(name, 1, self.now)
        if everybody:
            self._slo.decoded(self.now)
        for name in ended:
            self._close(name, "finished")
