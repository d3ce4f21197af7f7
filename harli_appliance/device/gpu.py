"""Which GPU there is, and what it and its driver can be used for: asked of NVML, judged here.

Knows NVML and versions. Does not know torch, so that a broken installation can still be told about; whether the
driver really makes partitions is for `driver` to find out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pynvml

from harli_appliance.errors import ConfigError

Version = tuple[int, int]
"""Major and minor."""

LEAST_CAPABILITY: Version = (8, 0)
"""Models are served in bfloat16, which GPUs compute from Ampere on."""
GREEN_CONTEXT_CUDA: Version = (12, 4)
"""The CUDA version whose driver API has green contexts (SM partitions)."""
GREEN_CONTEXT_DRIVER = 550
"""The driver branch that came with it."""
DRIVERS = {12: 525, 13: 580}
"""The oldest driver branch for a CUDA major version; it runs all minor versions (CUDA compatibility guide)."""

UUIDS = ("GPU-", "MIG-")
FALLBACK = "time slicing needs no partitions: the lanes take turns"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU and its driver.

    Attributes:
        driver: the driver's own version, e.g. ``580.65.06``.
        cuda: newest CUDA version that the driver runs.
        capability: compute capability.
    """

    name: str
    driver: str
    cuda: Version
    capability: Version
    memory_bytes: int
    free_bytes: int


def find_gpu(nvml: Any = pynvml) -> Gpu | None:
    """The GPU that torch calls ``cuda:0``; None without an NVIDIA driver, or when it is hidden.

    Raises:
        ConfigError: there is a driver, but it does not work or shows no GPU.
    """
    first = _first_visible()
    if first is not None and not first.isdigit() and not first.startswith(UUIDS):
        return None  # CUDA stops at the first that it does not know, as in "-1" and "none"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        return None
    except nvml.NVMLError as error:
        raise ConfigError(
            f"the NVIDIA driver does not work ({error}); load or install it again, or serve on the CPU "
            "(device.kind = 'cpu')",
            param="device.kind",
        ) from error
    try:
        return _read(nvml, handle(nvml))
    except nvml.NVMLError as error:
        raise ConfigError(
            f"the NVIDIA driver shows no usable GPU ({error}); see nvidia-smi, or serve on the CPU "
            "(device.kind = 'cpu')",
            param="device.kind",
        ) from error
    finally:
        nvml.nvmlShutdown()


def _first_visible() -> str | None:
    """What CUDA_VISIBLE_DEVICES names first; None when it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else visible.split(",")[0].strip()


def handle(nvml: Any) -> Any:
    """NVML's handle of torch's first GPU: NVML counts all of them, torch only those of CUDA_VISIBLE_DEVICES."""
    first = _first_visible() or ""
    if first.startswith(UUIDS):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def _read(nvml: Any, device: Any) -> Gpu:
    cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(device)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda=(cuda // 1000, cuda % 1000 // 10),
        capability=(int(major), int(minor)),
        memory_bytes=int(memory.total),
        free_bytes=int(memory.free),
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def serving_obstacle(gpu: Gpu, torch_cuda: Version | None) -> str | None:
    """Why models cannot be served on this GPU, and what to do; None when they can.

    Args:
        torch_cuda: the CUDA version that torch is built for, None for a build without CUDA.
    """
    if gpu.capability < LEAST_CAPABILITY:
        return (
            f"{gpu.name} has compute capability {_dotted(gpu.capability)} and serving needs "
            f"{_dotted(LEAST_CAPABILITY)} (bfloat16): use a newer GPU, or serve on the CPU (device.kind = 'cpu')"
        )
    if torch_cuda is None:
        return (
            "torch is a build without CUDA: remove .venv and run 'make setup' again on this machine, "
            "or serve on the CPU (device.kind = 'cpu')"
        )
    if gpu.cuda[0] < torch_cuda[0]:
        branch = DRIVERS.get(torch_cuda[0])
        wanted = f"driver {branch} or newer" if branch else "the newest driver"
        return (
            f"driver {gpu.driver} runs CUDA up to {_dotted(gpu.cuda)} and torch is built for "
            f"{_dotted(torch_cuda)}: install {wanted}, or serve on the CPU (device.kind = 'cpu')"
        )
    return None


def partition_obstacle(gpu: Gpu) -> str | None:
    """Why the driver cannot split this GPU between the lanes, and what works instead; None when it should."""
    if gpu.cuda < GREEN_CONTEXT_CUDA:
        return (
            f"driver {gpu.driver} (CUDA {_dotted(gpu.cuda)}) has no green contexts, which came with driver "
            f"{GREEN_CONTEXT_DRIVER} (CUDA {_dotted(GREEN_CONTEXT_CUDA)}); {FALLBACK}"
        )
    return None


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
