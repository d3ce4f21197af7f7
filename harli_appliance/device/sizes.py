"""Which sizes of inference partition are worth having. Pure arithmetic on what the driver says of the device."""

from __future__ import annotations

from harli_appliance.device.driver import Sms

MOST_SPLITS = 7
"""Each split has streams and a captured graph for every batch size, so a few, evenly spread, have to do."""
LEAST_SHARE = 1 / 8
"""A lane with less of the device than this has no use for it: decoding is then bound by compute."""


def split_sizes(sms: Sms, most: int = MOST_SPLITS) -> tuple[int, ...]:
    """SMs of the inference partition for each way to split, ascending; empty when the device is too small.

    Every size is a multiple that the driver can make, and leaves a remainder that can be a partition too.
    """
    fewest = max(sms.least, -(-int(sms.count * LEAST_SHARE) // sms.multiple) * sms.multiple)
    possible = range(fewest, sms.count - fewest + 1, sms.multiple)
    if len(possible) <= most:
        return tuple(possible)
    step = (len(possible) - 1) / (most - 1)
    return tuple(possible[round(index * step)] for index in range(most))
