"""Every policy by its name; each is a small class in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harli_appliance.errors import UsageError
from harli_appliance.scheduling.names import STATIC, check_policy
from harli_appliance.scheduling.policies.adaptive import Adaptive
from harli_appliance.scheduling.policies.every_n_steps import EveryNSteps
from harli_appliance.scheduling.policies.flexllm import FlexLlm
from harli_appliance.scheduling.policies.harli import Harli
from harli_appliance.scheduling.policies.llmstation import LlmStation
from harli_appliance.scheduling.policies.naive import Naive
from harli_appliance.scheduling.policies.policy import Policy, Situation
from harli_appliance.scheduling.policies.reactive import Reactive
from harli_appliance.scheduling.policies.serve_only import ServeOnly
from harli_appliance.scheduling.policies.static import Static
from harli_appliance.scheduling.policies.time_slice import TimeSlice
from harli_appliance.scheduling.policies.train_only import TrainOnly
from harli_appliance.scheduling.types import Split, most_even

__all__ = ["Policy", "Situation", "make_policy"]

Splits = Sequence[Split | None]

_MAKE: dict[str, Callable[[Splits], Policy]] = {
    "adaptive": Adaptive,
    "harli": Harli,
    "naive": lambda _: Naive(),
    "flexllm": lambda _: FlexLlm(),
    "llmstation": lambda _: LlmStation(),
    "adaptive-no-predictor": lambda _: Reactive(),
    "adaptive-no-holding": lambda splits: Adaptive(splits, holds=False),
    "adaptive-no-elastic-memory": lambda splits: Adaptive(splits, elastic=False),
    "adaptive-no-partitions": lambda _: TimeSlice(),  # what is left of `adaptive` is to take turns
    "time_slice": lambda _: TimeSlice(),
    "time_slice:64": lambda _: EveryNSteps(64),
    "time_slice:128": lambda _: EveryNSteps(128),
    "time_slice:512": lambda _: EveryNSteps(512),
    "serve_only": lambda _: ServeOnly(),
    "train_only": lambda _: TrainOnly(),
}


def make_policy(name: str, splits: Sequence[Split] = ()) -> Policy:
    """A fresh policy.

    Args:
        splits: the ways in which the device can be divided at run time; none where it is divided once for all.

    Raises:
        UsageError: there is none of that name; lists the known ones.
    """
    if check_policy(name).startswith("static"):
        return Static(_split(name.removeprefix(STATIC), splits))
    return _MAKE[name](splits or (None,))


def _split(name: str, splits: Sequence[Split]) -> Split | None:
    if name == "static":
        return most_even(splits) if splits else None
    for split in splits:
        if split.name == name:
            return split
    known = ", ".join(STATIC + split.name for split in splits) or "static"
    raise UsageError(f"this device has no such split; choose {known}", param="policy")
