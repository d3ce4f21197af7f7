"""Every policy by its name; each is a small class in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from harli_appliance.scheduling.names import check_policy
from harli_appliance.scheduling.policies.adaptive import Adaptive
from harli_appliance.scheduling.policies.every_n_steps import EveryNSteps
from harli_appliance.scheduling.policies.harli import Harli
from harli_appliance.scheduling.policies.naive import Naive
from harli_appliance.scheduling.policies.policy import Policy, Situation
from harli_appliance.scheduling.policies.serve_only import ServeOnly
from harli_appliance.scheduling.policies.time_slice import TimeSlice
from harli_appliance.scheduling.policies.train_only import TrainOnly

__all__ = ["Policy", "Situation", "make_policy"]

_MAKE: dict[str, Callable[[], Policy]] = {
    "adaptive": Adaptive,
    "harli": Harli,
    "naive": Naive,
    "time_slice": TimeSlice,
    "time_slice:64": partial(EveryNSteps, 64),
    "time_slice:128": partial(EveryNSteps, 128),
    "time_slice:512": partial(EveryNSteps, 512),
    "serve_only": ServeOnly,
    "train_only": TrainOnly,
}


def make_policy(name: str) -> Policy:
    """A fresh policy.

    Raises:
        UsageError: there is none of that name; lists the known ones.
    """
    return _MAKE[check_policy(name)]()
