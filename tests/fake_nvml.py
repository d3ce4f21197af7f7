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

    def __init__(self, init: str | None = None, lacks: str | None = None) -> None:
        self._init = init
        self._lacks = lacks
        self.open = 0
        self.asked: int | str | None = None

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
