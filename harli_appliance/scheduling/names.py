"""The names that policies have, for settings, requests and flags.

Knows no policy: what a name stands for is built by `scheduling.policies.make_policy`. Imports no
library, so that a command line can list the names at once.
"""

from __future__ import annotations

from typing import Final

from harli_appliance.errors import UsageError

_TURNS = "trains one micro-batch after every {} steps, whatever the deadlines"
POLICIES: Final = {
    "adaptive": "trains beside answers that come faster than promised; prompts wait that would make them late",
    "harli": "trains beside a step whose predicted time fits the promise (arXiv 2511.11729)",
    "naive": "always trains beside answers; nothing is predicted",
    "static": "always trains, on one split of the device that never changes; the most even one unless it is named",
    "flexllm": "puts a fixed number of training tokens into every step (arXiv 2402.18789)",
    "llmstation": "runs a fixed piece of training beside every step, and waits for both",
    "adaptive-no-predictor": "trains beside answers while none is behind; nothing is predicted",
    "adaptive-no-holding": "as adaptive, but prompts are read as soon as they arrive",
    "adaptive-no-elastic-memory": "as adaptive, but training keeps its slots until it is done with them",
    "adaptive-no-partitions": "as time_slice: what is left of adaptive where both cannot run at once",
    "time_slice": "trains between steps, as much as the deadlines leave",
    "time_slice:64": _TURNS.format(64),
    "time_slice:128": _TURNS.format(128),
    "time_slice:512": _TURNS.format(512),
    "serve_only": "never trains, also with nothing to serve",
    "train_only": "answers wait while there is something to train",
}
"""Every policy and what it does. ``static:SPLIT`` names the split where a device has several."""

POLICY_NAMES = tuple(POLICIES)
"""The first is the default."""

DEFAULT_POLICY = POLICY_NAMES[0]
STATIC = "static:"


def without_partitions(name: str) -> str:
    """The policy to follow where the device cannot be split: `name`, or taking turns if it runs both at once."""
    alone = name in ("serve_only", "train_only", "flexllm") or name.partition(":")[0] == "time_slice"
    return name if alone else "time_slice"


def check_policy(name: str) -> str:
    """`name`, when there is a policy of that name. Whether the device has the split that ``static:SPLIT`` names is
    seen when the policy is made.

    Raises:
        UsageError: there is none; lists the known ones.
    """
    if name not in POLICY_NAMES and not (name.startswith(STATIC) and name != STATIC):
        raise UsageError(
            f"no such policy; choose one of {', '.join(POLICY_NAMES)}, or {STATIC}SPLIT", param="policy"
        )
    return name


def describe_policy(name: str) -> str:
    """What a policy does, in one clause; nothing for one that only a newer appliance knows."""
    return POLICIES.get("static" if name.startswith(STATIC) else name, "")
