"""What to compute on: the GPU when there is one that works, else the CPU; and if not the GPU, why.

Runs before torch is loaded, because torch and SGLang decide at import. Knows NVML and torch's version file.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import structlog

from harli_appliance.device.gpu import Gpu, Version, find_gpu, serving_obstacle
from harli_appliance.errors import ConfigError

log = structlog.get_logger(__name__)


def choose_gpu(kind: str, find: Callable[[], Gpu | None] = find_gpu) -> Gpu | None:
    """The GPU to serve on, None for the CPU.

    Args:
        kind: the setting device.kind: ``auto`` takes the CPU when the GPU cannot be used, and logs why.

    Raises:
        ConfigError: `kind` is ``cuda`` and there is no GPU that can be used.
    """
    if kind == "cpu":
        return None
    try:
        gpu = find()
        if gpu is None:
            if kind == "cuda":
                raise ConfigError(
                    "device.kind is 'cuda' and there is no GPU with a driver: install NVIDIA's driver, or set "
                    "device.kind = 'auto'",
                    param="device.kind",
                )
            return None
        obstacle = serving_obstacle(gpu, torch_cuda())
        if obstacle is not None:
            raise ConfigError(obstacle, param="device.kind")
    except ConfigError as error:
        if kind == "cuda":
            raise
        log.warning("serving on the CPU", why=error.message)
        return None
    return gpu


def torch_cuda(origin: Path | None = None) -> Version | None:
    """The CUDA version that the installed torch is built for, read from its version file; None without CUDA.

    Args:
        origin: torch's ``__init__.py``; looked up when not given.
    """
    if origin is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        origin = Path(spec.origin)
    try:
        text = origin.with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    built = re.search(r"^cuda\b.*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(built[1]), int(built[2])) if built else None
