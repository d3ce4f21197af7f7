"""Policies: given a planned step, the tightest slack and what training could do, what does this tick do?

Each is a small class with one method. They see predictions, never the device; `Scheduler` calls the one that is
set. A bound that is None (unknown) is never taken for permission: the most careful decision follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from harli_appliance.config import PolicyName
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import UNLIMITED, Bound, Decision, Outlook, Step


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy decides on.

    Attributes:
        step: the serving step that would run; None when there is nothing to serve.
        slack_ms: time until the tightest deadline of the requests in service; infinity without one.
        outlook: what training could do.
    """

    step: Step | None
    slack_ms: float
    outlook: Outlook


class Policy(Protocol):
    def decide(self, now: Situation, predictor: Predictor) -> Decision: ...


def _without_serving(now: Situation) -> Decision:
    if now.outlook.ready:
        return Decision("training", "nothing_to_serve", serve=False, units=UNLIMITED)
    return Decision("idle", "nothing_to_do", serve=False, units=0)


def _pause(reason: str, bound: Bound | None) -> Decision:
    return Decision("pause", reason, serve=True, units=0, bound=bound)


class ServeOnly:
    """Training never runs: the baseline of the latency promise."""

    def decide(self, now: Situation, predictor: Predictor) -> Decision:
        if now.step is None:
            return Decision("idle", "policy_serve_only", serve=False, units=0)
        return _pause("policy_serve_only", predictor.solo(now.step))


class TrainOnly:
    """Requests wait while training has work: the baseline of finetuning throughput."""

    def decide(self, now: Situation, predictor: Predictor) -> Decision:
        if now.outlook.ready:
            return Decision("training", "policy_train_only", serve=False, units=UNLIMITED)
        if now.step is None:
            return Decision("idle", "nothing_to_do", serve=False, units=0)
        return _pause("no_training_work", predictor.solo(now.step))


class TimeSlice:
    """One after the other: after a step, as many whole units as the slack leaves room for."""

    def decide(self, now: Situation, predictor: Predictor) -> Decision:
        if now.step is None:
            return _without_serving(now)
        bound = predictor.solo(now.step)
        if not now.outlook.ready:
            return _pause("no_training_work", bound)
        if bound is None or not math.isfinite(now.outlook.unit_ms):
            return _pause("no_prediction", bound)
        # This step and the next one must both fit beside the units that run between them.
        spare = now.slack_ms - 2 * bound.upper_ms
        units = UNLIMITED if math.isinf(spare) else max(0, int(spare / now.outlook.unit_ms))
        if units == 0:
            return _pause("no_slack", bound)
        return Decision("time_slice", "slack_left", serve=True, units=min(units, 64), bound=bound)


class Spatial:
    """Both lanes at once whenever the co-run bound fits the slack; serving alone otherwise."""

    PRIOR = 1.5
    """Slowdown assumed of a co-run while none has been measured; beyond any published penalty (1.24)."""

    def decide(self, now: Situation, predictor: Predictor) -> Decision:
        if now.step is None:
            return _without_serving(now)
        solo = predictor.solo(now.step)
        if not now.outlook.ready:
            return _pause("no_training_work", solo)
        if solo is None:
            return _pause("no_prediction", None)
        bound = predictor.corun(now.step)
        reason = "corun_fits"
        if bound is None:
            bound = Bound(solo.expected_ms * self.PRIOR, solo.upper_ms * self.PRIOR)
            reason = "corun_prior_fits"
        if bound.upper_ms > now.slack_ms:
            return _pause("corun_too_slow", solo)
        return Decision("partition", reason, serve=True, units=UNLIMITED, bound=bound)


POLICIES: dict[PolicyName, type[Policy]] = {
    "serve_only": ServeOnly,
    "train_only": TrainOnly,
    "time_slice": TimeSlice,
    "spatial": Spatial,
}
