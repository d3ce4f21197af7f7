"""The names that policies have, for settings, requests and flags.

Knows no policy: what a name stands for is built by `scheduling.policies.make_policy`. Imports no
library, so that a command line can list the names at once.
"""

from __future__ import annotations

from harli_appliance.errors import UsageError

POLICY_NAMES = (
    "adaptive",
    "harli",
    "naive",
    "static",
    "time_slice",
    "time_slice:64",
    "time_slice:128",
    "time_slice:512",
    "serve_only",
    "train_only",
)
"""Every policy; the first is the default. ``static`` takes the name of a split where a device has several."""

DEFAULT_POLICY = POLICY_NAMES[0]
STATIC = "static:"


def without_partitions(name: str) -> str:
    """The policy to follow where the device cannot be split: `name`, or taking turns if it runs both at once."""
    alone = name in ("serve_only", "train_only") or name.partition(":")[0] == "time_slice"
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
