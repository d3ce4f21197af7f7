"""The checks of `harli doctor` that are about the GPU, and about what a model needs of the device.

Each takes what it judges as an argument. Imports neither torch nor SGLang: both may be what is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil

from harli_appliance.cli.check import Check
from harli_appliance.config import Settings
from harli_appliance.device.choose import torch_cuda
from harli_appliance.device.driver import CudaDriver, Driver
from harli_appliance.device.gpu import (
    Gpu,
    Version,
    find_gpu,
    partition_obstacle,
    serving_obstacle,
)
from harli_appliance.device.sizes import split_sizes
from harli_appliance.errors import ConfigError, HarliError
from harli_appliance.models.catalog import CATALOG, resolve_model
from harli_appliance.models.size import (
    BFLOAT16,
    COMFORTABLE,
    FLOAT32,
    GIB,
    ModelSize,
    model_size,
    suitable_slots,
)

REINSTALL = "remove .venv and run 'make setup' again"
KERNELS = (
    Check("sglang-kernel", "fail", "not installed", "SGLang's CUDA kernels: " + REINSTALL),
    Check("flashinfer-python", "warn", "not installed", "SGLang's fast attention: " + REINSTALL),
    Check("liger-kernel", "warn", "not installed", "fused norms and loss of finetuning: " + REINSTALL),
)
"""Packages that only a GPU needs: what is said when they are missing."""


def device_checks(settings: Settings | None) -> Iterator[Check]:
    """Everything that depends on which device there is."""
    gpu: Gpu | None = None
    try:
        gpu = find_gpu()
    except HarliError as error:
        yield Check("gpu", "fail", error.message)
    else:
        yield check_gpu(gpu, torch_cuda(), wanted=settings is not None and settings.device.kind == "cuda")
    on_gpu = gpu is not None and (settings is None or settings.device.kind != "cpu")
    if gpu is not None and on_gpu:
        yield from check_kernels()
        yield check_partitions(gpu, CudaDriver)
    if settings is not None:
        yield check_model_memory(settings, gpu if on_gpu else None)


def check_gpu(gpu: Gpu | None, built_for: Version | None, *, wanted: bool) -> Check:
    """Whether there is a GPU that can serve.

    Args:
        built_for: torch's CUDA version, None without one.
        wanted: device.kind is ``cuda``.
    """
    if gpu is None:
        if wanted:
            advice = "install NVIDIA's driver, or set device.kind = 'auto'"
            return Check("gpu", "fail", "none found, and device.kind is 'cuda'", advice)
        return Check("gpu", "ok", "none found, so it computes on the CPU")
    cuda, capability = (".".join(map(str, version)) for version in (gpu.cuda, gpu.capability))
    found = (
        f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, compute capability {capability}, driver {gpu.driver} "
        f"(CUDA {cuda})"
    )
    obstacle = serving_obstacle(gpu, built_for)
    return Check("gpu", "ok", found) if obstacle is None else Check("gpu", "fail", found, obstacle)


def check_kernels(version_of: Callable[[str], str] = metadata.version) -> Iterator[Check]:
    for missing in KERNELS:
        try:
            yield Check(missing.name, "ok", version_of(missing.name))
        except metadata.PackageNotFoundError:
            yield missing


def check_partitions(gpu: Gpu, make_driver: Callable[[], Driver]) -> Check:
    """Whether the GPU can be split between the lanes. Without it everything works, in turns."""
    obstacle = partition_obstacle(gpu)
    if obstacle is not None:
        return Check("partitions", "warn", "none", obstacle)
    try:
        sms = make_driver().device()
    except HarliError as error:
        return Check("partitions", "warn", "none", error.message)
    sizes = split_sizes(sms)
    if not sizes:
        return Check("partitions", "warn", f"{sms.count} SMs are too few to split", "the lanes take turns")
    pairs = ", ".join(f"{size}+{sms.count - size}" for size in sizes)
    return Check("partitions", "ok", f"{sms.count} SMs in steps of {sms.multiple}: {pairs}")


def check_model_memory(settings: Settings, gpu: Gpu | None) -> Check:
    """Whether weights and KV cache fit what is free on the device (None: this machine's memory).

    A model that has to be fetched first is not looked at: nothing is downloaded here.
    """
    name = settings.model.path
    if name in CATALOG and not (settings.models / name).is_dir() and not Path(name).expanduser().is_dir():
        return Check("model", "ok", f"{name}: is fetched when first served")
    try:
        size = model_size(resolve_model(name, settings))
    except ConfigError as error:
        return Check("model", "fail", error.message)
    if size is None:
        return Check(
            "model", "ok", f"{name}: its weights are not safetensors files, so their size is not known"
        )
    free = gpu.free_bytes if gpu is not None else psutil.virtual_memory().available
    slots = settings.memory.pool_slots or suitable_slots(size, free, gpu=gpu is not None)
    itemsize, where = (BFLOAT16, gpu.name) if gpu is not None else (FLOAT32, "this machine")
    return judge_memory(name, size, slots, itemsize, free, where)


def judge_memory(name: str, size: ModelSize, slots: int, itemsize: int, free: int, where: str) -> Check:
    """Compare what weights and `slots` slots take, in numbers of `itemsize` bytes, with `free` bytes."""
    needed = size.bytes(slots, itemsize)
    found = (
        f"{name}: {size.parameters / 1e6:,.0f} M parameters and {slots} slots take {needed / GIB:.1f} GiB; "
        f"{free / GIB:.1f} GiB free on {where}"
    )
    if needed <= COMFORTABLE * free:
        return Check("model", "ok", found)
    return Check("model", "warn" if needed <= free else "fail", found, size.advice(free, itemsize))
