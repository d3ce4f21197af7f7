"""What a policy is: given a planned step, deadlines and what training could do, what does this tick do?

Each policy is a small class. It sees predictions, never the device, and is a pure function of the situations
that it was shown: a simulator calls it as the engine does. A bound that is None (unknown) is never taken for
permission: the most careful decision follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from harli_appliance.scheduling.reasons import Reason
from harli_appliance.scheduling.types import (
    UNLIMITED,
    Admission,
    Bound,
    Costs,
    Decision,
    Outlook,
    Queue,
    Split,
    Step,
)

MOST_UNITS = 64
"""Of one slice, however much room there is: a request that arrives waits for the slice to end."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy decides on.

    Attributes:
        step: the serving step that would run; None when there is nothing to serve.
        slack_ms: time until the tightest deadline of the requests in service; infinity without one.
        tpot_ms: the promised time per output token, of the strictest request in service.
        outlook: what training could do.
        ended, missed: requests that have ended so far, and those of them that missed their targets.
    """

    step: Step | None
    slack_ms: float
    tpot_ms: float
    outlook: Outlook
    ended: int = 0
    missed: int = 0


class Policy(ABC):
    """The cases that every policy treats alike; `share` is what makes one."""

    fuses: bool = False
    """Whether it may want training tokens to join a serving step's pass."""
    elastic: bool = True
    """Whether serving takes slots back that training holds; otherwise it waits until training is done with them:
    with those of a micro-batch when it ends, with those of the adapter's state when the job does."""

    def admits(self, queue: Queue | None, outlook: Outlook, costs: Costs) -> Admission:
        """What the next step may be planned from; `queue` is None when no prompt waits."""
        return "all"

    def decide(self, now: Situation, costs: Costs) -> Decision:
        if now.step is None:
            return self.alone(now.outlook)
        if not now.outlook.ready:
            return pause("no_training_work", costs.solo(now.step))
        return self.share(now.step, now, costs)

    def alone(self, outlook: Outlook) -> Decision:
        """Nothing to serve: train if there is something to train."""
        if outlook.ready:
            return Decision("training", "nothing_to_serve", units=UNLIMITED)
        return Decision("idle", "nothing_to_do", units=0)

    @abstractmethod
    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        """Both want the device: `step` is `now.step`, and training is ready."""


def pause(reason: Reason, bound: Bound | None) -> Decision:
    """Serve, while training waits."""
    return Decision("pause", reason, units=0, bound=bound)


def beside(reason: Reason, bound: Bound | None, split: Split | None) -> Decision:
    """Serve, and train beside it."""
    return Decision("partition", reason, units=UNLIMITED, bound=bound, split=split)
