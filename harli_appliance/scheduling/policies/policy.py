"""What a policy is: given a planned step, the tightest slack and what training could do, what does this tick do?

Each policy is a small class with one method. It sees predictions, never the device. A bound that is None
(unknown) is never taken for permission: the most careful decision follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from harli_appliance.scheduling.types import UNLIMITED, Bound, Costs, Decision, Outlook, Step


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy decides on.

    Attributes:
        step: the serving step that would run; None when there is nothing to serve.
        slack_ms: time until the tightest deadline of the requests in service; infinity without one.
        tpot_ms: the promised time per output token.
        outlook: what training could do.
    """

    step: Step | None
    slack_ms: float
    tpot_ms: float
    outlook: Outlook


class Policy(Protocol):
    def decide(self, now: Situation, costs: Costs) -> Decision: ...


def without_serving(now: Situation) -> Decision:
    """Nothing to serve: train if there is something to train."""
    if now.outlook.ready:
        return Decision("training", "nothing_to_serve", serve=False, units=UNLIMITED)
    return Decision("idle", "nothing_to_do", serve=False, units=0)


def pause(reason: str, bound: Bound | None) -> Decision:
    """Serve, while training waits."""
    return Decision("pause", reason, serve=True, units=0, bound=bound)
