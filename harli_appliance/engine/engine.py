"""The engine: one tick after the other, both lanes, until stopped.

A tick plans, decides, launches both lanes, collects and observes. SGLang and the pool are touched on the
inference lane only; the engine itself lives on the event loop. Does not know HTTP or SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from harli_appliance.engine.lanes import Lane
from harli_appliance.engine.steps import step_of
from harli_appliance.engine.streams import TokenStream
from harli_appliance.engine.telemetry import SAMPLE_EVERY_S, Rate, Telemetry
from harli_appliance.errors import Overloaded
from harli_appliance.memory.pool import PoolUse, SlotPool
from harli_appliance.runtime.protocol import NewTokens, QueueDepth, Runtime, StepPlan, Submission
from harli_appliance.scheduling.reasons import Reason
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import RequestTiming, SloTracker
from harli_appliance.scheduling.types import UNLIMITED, Decision, Step
from harli_appliance.schema import SloClass
from harli_appliance.training.trainer import Trainer

log = structlog.get_logger(__name__)

CORUN_SHARE = 0.9
"""A step counts as co-run when the training lane was busy for this share of it, as solo below the rest."""
FAULTS_TO_DEGRADE = 5
FAULT_WINDOW_S = 60.0
FAULT_PAUSE_S = 0.1
STALL_S = 0.005
"""How soon to plan again when requests wait but none can run (the cache is full of running ones)."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """A snapshot for the dashboard."""

    decision: Decision
    ticks: dict[Reason, int]
    """Since start, by their reason."""
    depth: QueueDepth
    pool: PoolUse
    output_tokens: int
    output_tokens_per_s: float
    training_tokens_per_s: float
    degraded: bool


@dataclass(frozen=True, slots=True)
class _Admitted:
    """The next batch, or the slots that must come back from training before there can be one."""

    plan: StepPlan | None
    shortage: int


class Engine:
    """Drives a runtime and a trainer over two lanes.

    Args:
        max_queued: requests that may wait for their first step; more are refused.
        arrange: puts the lanes where a decision wants them on the device, before anything of it is launched.
    """

    def __init__(
        self,
        runtime: Runtime,
        pool: SlotPool,
        scheduler: Scheduler,
        trainer: Trainer,
        slo: SloTracker,
        inference: Lane,
        training: Lane,
        *,
        max_queued: int,
        arrange: Callable[[Decision], None] = lambda _: None,
    ) -> None:
        self.slo = slo
        self.telemetry = Telemetry()
        self.on_ended: Callable[[NewTokens, RequestTiming], None] | None = None
        """Called once for every request, however it ended."""
        self.max_queued = max_queued
        """Requests that may wait for their first step."""
        self._runtime = runtime
        self._pool = pool
        self._scheduler = scheduler
        self._trainer, self._units = trainer, trainer.units
        self._inference = inference
        self._training = training
        self._arrange = arrange
        self._work = asyncio.Event()
        self._streams: dict[str, TokenStream] = {}
        self._submissions: deque[Submission] = deque()
        self._aborts: deque[str] = deque()
        self._refused: deque[NewTokens] = deque()
        self._depth = QueueDepth(0, 0)
        self._decision = Decision("idle", "nothing_to_do", units=0)
        self._ticks: Counter[Reason] = Counter()
        self._pool_use = pool.use()
        self._output_tokens = 0
        self._output_rate, self._training_rate = Rate(), Rate()
        self._rates = (0.0, 0.0)
        self._faults: deque[float] = deque(maxlen=FAULTS_TO_DEGRADE)

    # -- requests ----------------------------------------------------------------------------------------

    def submit(self, submission: Submission, slo_class: SloClass = "standard") -> TokenStream:
        """Queue a request.

        Raises:
            UsageError: it cannot be served as asked.
            Overloaded: the queue is full.
        """
        self._runtime.check(submission)
        waiting = self._depth.waiting + len(self._submissions)
        if waiting >= self.max_queued:
            raise Overloaded(f"{waiting} requests are waiting already; try again later")
        stream = TokenStream(submission.id, self._abort)
        self._streams[submission.id] = stream
        self._submissions.append(submission)
        self.slo.arrived(submission.id, time.perf_counter(), slo_class)
        self.wake()
        return stream

    def _abort(self, request: str) -> None:
        self._aborts.append(request)
        self.wake()

    def wake(self) -> None:
        """Make an idle engine look again: something arrived or changed."""
        self._work.set()

    def use_policy(self, policy: str) -> None:
        self._scheduler.use(policy)
        self.wake()

    # -- the loop ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tick until cancelled."""
        sampler = asyncio.create_task(self._sample_forever())
        failed = 0
        try:
            while True:
                try:
                    await self._tick()
                    failed = 0
                except Exception:
                    # Planning failed: no batch is known to blame. Go on, and say so if it keeps happening.
                    log.exception("a tick failed")
                    self._faults.append(time.perf_counter())
                    failed += 1
                    if failed >= FAULTS_TO_DEGRADE:
                        self._give_up()
                    await asyncio.sleep(FAULT_PAUSE_S)
        finally:
            sampler.cancel()

    async def _tick(self) -> None:
        self._work.clear()
        outlook = self._units.outlook()
        admission = self._scheduler.admits(self.slo.queue(time.perf_counter()), outlook)
        plan = await self._plan(prompts=admission == "all") if admission != "none" else None
        self._deliver_refused()
        step = step_of(plan) if plan is not None else None
        slack = self.slo.slack_ms(time.perf_counter())
        decision = self._scheduler.decide(step, slack, self.slo.tightest_tpot_ms, outlook)
        self._decision = decision
        self._ticks[decision.reason] += 1
        self._arrange(decision)
        if plan is None or step is None:
            self._units.launch(decision.units)
            await self._wait_for_work()
            return
        measured = await self._run(plan, decision)
        if decision.after:
            self._arrange(replace(decision, mode="time_slice", split=None))
            await self._units.launch(decision.after, self._inference)
        if measured is not None:
            self._observe(step, decision, *measured)

    async def _run(self, plan: StepPlan, decision: Decision) -> tuple[float, float] | None:
        """Both lanes, as decided; what `_serve` returns."""
        if decision.mode == "fused":
            started = time.perf_counter()
            await self._units.launch(decision.units, self._inference, decision.fused_tokens)
            ahead_ms = 1e3 * (time.perf_counter() - started)
            measured = await self._serve(plan)
            return measured and (measured[0] + ahead_ms, measured[1])
        serving = asyncio.create_task(self._serve(plan))
        lane = self._inference if decision.mode == "time_slice" else self._training
        training = self._units.launch(decision.units, lane, place=decision.split)
        measured = await serving
        if decision.units < UNLIMITED:
            await training
        return measured

    async def _wait_for_work(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._work.wait(), STALL_S if self._depth.waiting else None)

    async def _plan(self, *, prompts: bool) -> StepPlan | None:
        """The next step; slots that it may need are taken back from training first.

        Args:
            prompts: whether it may read prompts while there are answers to go on with.
        """
        elastic = self._scheduler.elastic
        admitted = await self._inference.run(self._admit_and_plan, prompts, elastic)
        shortage = admitted.shortage
        if elastic and admitted.plan is None and self._depth.waiting > self._depth.compiling:
            # Requests wait though the forecast saw enough: the runtime's own admission is stricter. Serving
            # comes first, so it gets what could be spared, and if that was not enough, everything.
            shortage = max(shortage, self._pool_use.spared or self._pool_use.leased)
        if shortage:
            for lease in self._pool.revoke(shortage):
                await lease.released()
            admitted = await self._inference.run(self._admit_and_plan, prompts, False)
        return admitted.plan

    def _admit_and_plan(self, prompts: bool, reclaim: bool) -> _Admitted:
        """On the inference lane: requests in and out, slots settled, the next batch.

        Args:
            reclaim: whether to stop before planning when leased slots must come back first.
        """
        while self._submissions:
            submission = self._submissions.popleft()
            try:
                self._runtime.submit(submission)
            except Exception as error:
                log.exception("the runtime refused a request", request=submission.id)
                self._refused.append(NewTokens(submission.id, (), "error", error=str(error)))
        while self._aborts:
            self._runtime.abort(self._aborts.popleft())
        self._pool.settle()
        shortage = self._pool.shortage() if reclaim else 0
        plan = self._runtime.plan(prompts=prompts) if shortage == 0 else None
        self._refused.extend(self._runtime.drain())
        self._depth = self._runtime.depth()
        self._pool_use = self._pool.use()
        return _Admitted(plan, shortage)

    async def _serve(self, plan: StepPlan) -> tuple[float, float] | None:
        """Run the step and hand out its tokens.

        Returns:
            Milliseconds it took and the share of them that training ran beside it; None when it failed.
        """
        busy = self._training.busy_s()
        try:
            outcome = await self._inference.run(self._runtime.execute, plan)
        except Exception as error:
            log.exception("a serving step failed", requests=plan.requests)
            self._faults.append(time.perf_counter())
            for item in await self._recovered(plan, error):
                self._deliver(item, time.perf_counter())
            return None
        overlap = (self._training.busy_s() - busy) / max(outcome.seconds, 1e-9)
        now = time.perf_counter()
        for item in outcome.tokens:
            self._deliver(item, now)
        produced = sum(len(item.tokens) for item in outcome.tokens)
        self._output_tokens += produced
        self.telemetry.step(1e3 * outcome.seconds, produced)
        return 1e3 * outcome.seconds, overlap

    async def _recovered(self, plan: StepPlan, error: Exception) -> Sequence[NewTokens]:
        try:
            return await self._inference.run(self._runtime.recover, plan, error)
        except Exception:
            log.exception("a failed step cannot be cleaned up", requests=plan.requests)
            self._aborts.extend(plan.requests)
            return [NewTokens(request, (), "error", error=str(error)) for request in plan.requests]

    def _give_up(self) -> None:
        """Planning fails again and again: nobody shall wait for what does not come."""
        for request in list(self._streams):
            self._aborts.append(request)
            self._deliver(
                NewTokens(request, (), "error", error="the engine cannot go on"), time.perf_counter()
            )

    def _observe(self, step: Step, decision: Decision, took_ms: float, overlap: float) -> None:
        if decision.mode == "fused":
            self._scheduler.observe(step, took_ms, corun=False, fused_tokens=decision.fused_tokens)
        elif overlap >= CORUN_SHARE and decision.units:  # else a file is encoded there, or the like
            self._scheduler.observe(step, took_ms, corun=True, split=decision.split)
        elif overlap <= 1.0 - CORUN_SHARE:
            self._scheduler.observe(step, took_ms, corun=False, split=decision.split)

    def _deliver_refused(self) -> None:
        """Requests that ended outside of a step: aborted in the queue, or refused by the runtime."""
        while self._refused:
            self._deliver(self._refused.popleft(), time.perf_counter())

    def _deliver(self, item: NewTokens, now: float) -> None:
        gap = self.slo.produced(item.request, len(item.tokens), now)
        if gap is not None:
            self.telemetry.gap(gap)
        stream = self._streams.get(item.request)
        if item.finish is not None:
            self._streams.pop(item.request, None)
            self._close(item, aborted=stream is not None and stream.aborted)
        if stream is not None:
            stream.push(item)

    def _close(self, item: NewTokens, *, aborted: bool) -> None:
        failed = item.finish in ("abort", "error")
        timing = self.slo.ended(item.request, "aborted" if aborted else "failed" if failed else "finished")
        if timing is None:
            return
        if timing.met is not None:
            self._scheduler.ended(timing.met)
        if self.on_ended is not None:
            self.on_ended(item, timing)

    # -- telling -----------------------------------------------------------------------------------------

    @property
    def degraded(self) -> bool:
        """Whether steps failed so often of late that a person should look."""
        return (
            len(self._faults) == FAULTS_TO_DEGRADE and time.perf_counter() - self._faults[0] < FAULT_WINDOW_S
        )

    def state(self) -> EngineState:
        return EngineState(
            decision=self._decision,
            ticks=dict(self._ticks),
            depth=QueueDepth(self._depth.running, self._depth.waiting + len(self._submissions)),
            pool=self._pool_use,
            output_tokens=self._output_tokens,
            output_tokens_per_s=self._rates[0],
            training_tokens_per_s=self._rates[1],
            degraded=self.degraded,
        )

    async def _sample_forever(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            now = time.perf_counter()
            trainer = self._trainer.state()
            self._rates = (
                self._output_rate.at(now, self._output_tokens),
                self._training_rate.at(now, trainer.tokens),
            )
            if self._decision.mode == "idle" and not self._streams and not self.telemetry.unsampled:
                continue
            if self._decision.mode in ("idle", "training"):
                self._pool_use = await self._inference.run(self._pool.use)
            self.telemetry.sample(
                time.time(), self._decision.mode, self._depth.running, trainer.tokens, self._pool_use
            )
