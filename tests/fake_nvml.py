"""A stand-in for the module `pynvml`: one H100 whose readings are attributes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml


class FakeNvml:
    """Answers the calls that the appliance makes; errors are pynvml's own.

    Args:
        init: name of the error that nvmlInit raises.
        lacks: a function that answers NVMLError_NotSupported.
    """

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_GPM_METRICS_GET_VERSION = pynvml.NVML_GPM_METRICS_GET_VERSION
    c_nvmlGpmMetricsGet_t = pynvml.c_nvmlGpmMetricsGet_t

    def __init__(self, init: str | None = None, lacks: str | None = None) -> None:
        self._init = init
        self._lacks = lacks
        self.open = 0
        self.asked: int | str | None = None
        self.gpm = True
        self.samples = 0
        self.shares = {
            pynvml.NVML_GPM_METRIC_SM_UTIL: 80.0,
            pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 30.0,
            pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 55.0,
        }
        """Percentages that GPM tells; a metric that is not here answers "not supported"."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name == self._lacks:

            def refuse(*_: object) -> None:
                raise pynvml.NVMLError_NotSupported

            return refuse
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        if self._init is not None:
            raise getattr(pynvml, self._init)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked = index
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetName(self, device: str) -> bytes:
        return b"NVIDIA H100 80GB HBM3"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetCudaComputeCapability(self, device: str) -> list[int]:
        return [9, 0]

    def nvmlDeviceGetMemoryInfo(self, device: str) -> SimpleNamespace:
        return SimpleNamespace(total=80 << 30, free=79 << 30, used=1 << 30)

    def nvmlDeviceGetPowerUsage(self, device: str) -> int:
        return 350_500  # milliwatts

    def nvmlDeviceGetTemperature(self, device: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetClockInfo(self, device: str, clock: int) -> int:
        return 1755

    def nvmlDeviceGetUtilizationRates(self, device: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=99)

    # -- GPM: a sample is a number's address; whoever allocates must free ------------------------------

    def nvmlGpmQueryDeviceSupport(self, device: str) -> SimpleNamespace:
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self) -> Any:
        self.samples += 1
        return pynvml.c_nvmlGpmSample_t()

    def nvmlGpmSampleGet(self, device: str, sample: Any) -> Any:
        return sample

    def nvmlGpmSampleFree(self, sample: Any) -> None:
        self.samples -= 1

    def nvmlGpmMetricsGet(self, question: Any) -> Any:
        assert question.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        for metric in question.metrics[: question.numMetrics]:
            metric.nvmlReturn = 0 if metric.metricId in self.shares else pynvml.NVML_ERROR_NOT_SUPPORTED
            metric.value = self.shares.get(metric.metricId, 0.0)
        return question
