"""The checks of `harli doctor`. Each looks at one thing and says what to do when it is not right.

Knows versions, cores, memory, disk, ports. Imports neither torch nor SGLang: a broken installation is exactly
what is to be diagnosed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from harli_appliance.cli.connect import connect
from harli_appliance.config import Settings, load_settings
from harli_appliance.errors import HarliError

GIB = 1 << 30
LEAST_PYTHON = (3, 11)
LEAST_MEMORY_GIB = 4
LEAST_DISK_GIB = 2
LEAST_CORES = 2

PACKAGES = {"torch": "2.13.0", "sglang": "0.5.21", "transformers": "5.12", "peft": "0.21"}
"""What serving needs, and the version it was built against (the start of it)."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def all_checks(url: str | None) -> list[Check]:
    checks = [_python(), *(_package(name, wanted) for name, wanted in PACKAGES.items())]
    checks += [_gpu(), _cores(), _memory()]
    try:
        settings = load_settings()
    except HarliError as error:
        return [*checks, Check("settings", "fail", error.message)]
    return [*checks, Check("settings", "ok", f"model {settings.model.path}"), *_here(settings, url)]


def _here(settings: Settings, url: str | None) -> Iterator[Check]:
    yield _home(settings.home)
    yield _disk(settings.home)
    appliance = asyncio.run(_appliance(url))
    yield appliance
    if appliance.level != "ok":
        yield _port(settings.server.host, settings.server.port)


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] < LEAST_PYTHON:
        return Check("python", "fail", found, "install Python 3.11 or newer and run 'make setup' again")
    return Check("python", "ok", found)


def _package(name: str, wanted: str) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", "run 'make setup'")
    if not found.startswith(wanted):
        return Check(name, "warn", found, f"built against {wanted}; run 'make setup' to get it")
    return Check(name, "ok", found)


def _gpu() -> Check:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return Check("gpu", "ok", "none found, so it computes on the CPU")
    try:
        names = [
            _text(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index)))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()
    return Check("gpu", "ok", ", ".join(names) or "driver without a device")


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _cores() -> Check:
    count = len(os.sched_getaffinity(0))
    if count < LEAST_CORES:
        return Check("cores", "warn", str(count), "with one core serving and training take turns")
    return Check("cores", "ok", str(count))


def _memory() -> Check:
    free = psutil.virtual_memory().available / GIB
    found = f"{free:.1f} GiB free"
    if free < LEAST_MEMORY_GIB:
        return Check("memory", "warn", found, f"close something: {LEAST_MEMORY_GIB} GiB are comfortable")
    return Check("memory", "ok", found)


def _home(home: Path) -> Check:
    """Looks without creating anything: that is the appliance's to do."""
    folder = _existing(home)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "home", "fail", f"{folder}: {error.strerror}", "set HARLI_HOME to a folder you can write to"
        )
    return Check("home", "ok", str(home))


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _disk(home: Path) -> Check:
    free = shutil.disk_usage(_existing(home)).free / GIB
    found = f"{free:.1f} GiB free for {home}"
    if free < LEAST_DISK_GIB:
        return Check("disk", "warn", found, "make room, or set HARLI_HOME to another disk")
    return Check("disk", "ok", found)


async def _appliance(url: str | None) -> Check:
    try:
        async with connect(url) as client:
            status = await client.status()
    except HarliError as error:
        return Check("appliance", "warn", error.message)
    return Check("appliance", "ok", f"{status.state} at {client.base_url}, serving {status.model}")


def _port(host: str, port: int) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = "stop what listens there or set server.port"
            return Check("port", "fail", f"{host}:{port}: {error.strerror or error}", advice)
    return Check("port", "ok", f"{host}:{port} is free")
