"""How the device's compute is split between the lanes. On a CPU a partition is a set of cores for each lane.

Knows cores; does not know lanes' work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from harli_appliance.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Partition:
    """Cores of each lane. On one core both lanes share it and only time slicing makes sense."""

    inference: tuple[int, ...]
    training: tuple[int, ...]

    @property
    def inference_share(self) -> float:
        return len(self.inference) / (len(self.inference) + len(self.training))


def cpu_partition(inference: Sequence[int] | None = None, training: Sequence[int] | None = None) -> Partition:
    """Split the cores this process may use: half each when nothing is asked for.

    Raises:
        ConfigError: a core that this process may not use was asked for.
    """
    allowed = sorted(os.sched_getaffinity(0))
    for name, cores in (("inference_cores", inference), ("training_cores", training)):
        wrong = sorted(set(cores or ()) - set(allowed))
        if wrong:
            raise ConfigError(
                f"device.{name}: core {wrong[0]} cannot be used here; use some of {allowed}",
                param=f"device.{name}",
            )
    half = max(1, len(allowed) // 2)
    if inference and not training:
        training = [core for core in allowed if core not in inference] or inference
    elif training and not inference:
        inference = [core for core in allowed if core not in training] or training
    return Partition(
        inference=tuple(inference or allowed[:half]), training=tuple(training or allowed[-half:])
    )


def describe_cores(cores: Sequence[int]) -> str:
    return f"core {cores[0]}" if len(cores) == 1 else "cores " + ",".join(map(str, cores))


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown CPU"
