"""The gauges of a machine without a GPU: cores, this process's memory, the processor's temperature and clock."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from harli_appliance.device.monitor import Reading
from harli_appliance.device.partition import Partition

PROCESSOR_SENSORS = ("coretemp", "k10temp", "cpu_thermal", "zenpower")
"""What Linux drivers call a processor's temperature."""


class CpuGauges:
    """Reads the cores of both lanes; shares are since the previous reading."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._process = psutil.Process()

    def read(self) -> Reading:
        busy = [share / 100 for share in psutil.cpu_percent(percpu=True)]
        inference, training = self._partition.inference, self._partition.training
        clock = psutil.cpu_freq()
        return Reading(
            compute=_mean(busy, sorted({*inference, *training})),
            inference=_mean(busy, inference),
            training=_mean(busy, training),
            memory_bytes=self._process.memory_info().rss,
            memory_total_bytes=psutil.virtual_memory().total,
            temperature_c=_temperature(),
            clock_mhz=clock.current if clock is not None else None,
        )

    def close(self) -> None:
        """There is nothing to give back."""


def _mean(busy: Sequence[float], cores: Sequence[int]) -> float | None:
    known = [busy[core] for core in cores if core < len(busy)]
    return sum(known) / len(known) if known else None


def _temperature() -> float | None:
    sensors = psutil.sensors_temperatures()
    for name in PROCESSOR_SENSORS:
        if sensors.get(name):
            return float(max(sensor.current for sensor in sensors[name]))
    return None
