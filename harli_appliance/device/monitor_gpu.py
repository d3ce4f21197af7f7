"""The gauges of an NVIDIA GPU: NVML, and on Hopper and newer its performance monitoring (GPM).

GPM compares two samples of the hardware's counters, so the first reading has none of its figures. A GPU without
GPM tells how long any kernel ran instead, which is no measure of how many SMs did. Knows NVML's calls and units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml

from harli_appliance.device.gpu import handle
from harli_appliance.device.monitor import Reading

SM_UTIL, TENSOR_UTIL, BANDWIDTH_UTIL = (
    pynvml.NVML_GPM_METRIC_SM_UTIL,
    pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
)
METRICS = (SM_UTIL, TENSOR_UTIL, BANDWIDTH_UTIL)


class GpuGauges:
    """Reads the GPU that torch calls ``cuda:0``."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._device = handle(nvml)
        self._gpm = self._has_gpm()
        self._before: Any = None

    def read(self) -> Reading:
        nvml, device = self._nvml, self._device
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        shares = self._gpm_shares()
        return Reading(
            compute=shares.get(SM_UTIL) if self._gpm else self._kernel_share(),
            tensor=shares.get(TENSOR_UTIL),
            bandwidth=shares.get(BANDWIDTH_UTIL),
            memory_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            power_w=self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3),
            temperature_c=self._ask(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
            clock_mhz=self._ask(lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
        )

    def close(self) -> None:
        if self._before is not None:
            self._nvml.nvmlGpmSampleFree(self._before)
            self._before = None
        self._nvml.nvmlShutdown()

    def _has_gpm(self) -> bool:
        try:
            return bool(self._nvml.nvmlGpmQueryDeviceSupport(self._device).isSupportedDevice)
        except self._nvml.NVMLError:
            return False

    def _gpm_shares(self) -> dict[int, float]:
        """Shares since the previous reading, by metric; nothing at the first, or without GPM."""
        if not self._gpm:
            return {}
        nvml, before = self._nvml, self._before
        now = nvml.nvmlGpmSampleAlloc()
        try:
            nvml.nvmlGpmSampleGet(self._device, now)
        except nvml.NVMLError:
            nvml.nvmlGpmSampleFree(now)
            raise
        self._before = now
        if before is None:
            return {}
        try:
            question = nvml.c_nvmlGpmMetricsGet_t()
            question.version = nvml.NVML_GPM_METRICS_GET_VERSION
            question.numMetrics = len(METRICS)
            question.sample1, question.sample2 = before, now
            for place, metric in enumerate(METRICS):
                question.metrics[place].metricId = metric
            answer = nvml.nvmlGpmMetricsGet(question)
        finally:
            nvml.nvmlGpmSampleFree(before)
        told = (answer.metrics[place] for place in range(len(METRICS)))
        return {int(one.metricId): one.value / 100 for one in told if one.nvmlReturn == 0}

    def _kernel_share(self) -> float | None:
        return self._ask(lambda: self._nvml.nvmlDeviceGetUtilizationRates(self._device).gpu / 100)

    def _ask(self, question: Callable[[], float]) -> float | None:
        """Some GPUs do not tell some things, a passively cooled one nothing of power for example."""
        try:
            return float(question())
        except self._nvml.NVMLError:
            return None
