"""The checks of `harli doctor`. Each looks at one thing and says what to do when it is not right.

Knows versions, cores, memory, disk and ports; `checks_device` knows the GPU. Imports neither torch nor SGLang: a
broken installation is exactly what is to be diagnosed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from harli_appliance.cli.check import Check
from harli_appliance.cli.checks_device import device_checks
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

INTERNALS = (
    "from harli_appliance.runtime import cpu_stand_ins; cpu_stand_ins.install(); "
    "from harli_appliance.errors import HarliError; "
    "from harli_appliance.runtime import internals\n"
    "try: internals.check()\n"
    "except HarliError as error: raise SystemExit(error.message)"
)
"""Runs in a process of its own: loading SGLang takes seconds, and may fail in any way."""
INTERNALS_TIMEOUT_S = 180


def all_checks(url: str | None) -> Iterator[Check]:
    yield _python()
    for name, wanted in PACKAGES.items():
        yield _package(name, wanted)
    yield _internals()
    yield _cores()
    yield _memory()
    try:
        settings = load_settings()
    except HarliError as error:
        yield Check("settings", "fail", error.message)
        yield from device_checks(None)
        return
    yield Check("settings", "ok", f"model {settings.model.path}")
    yield from device_checks(settings)
    yield from _here(settings, url)


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


def _internals() -> Check:
    """Whether SGLang loads here and has what the runtime steps; nothing is started."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and code
            [sys.executable, "-c", INTERNALS], capture_output=True, text=True, timeout=INTERNALS_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        advice = "look for what keeps the machine busy, and try again"
        return Check("internals", "fail", f"SGLang did not load within {INTERNALS_TIMEOUT_S} s", advice)
    if done.returncode == 0:
        return Check("internals", "ok", "SGLang loads, and has everything that is relied on")
    said = (done.stderr.strip() or "no message").splitlines()[-1]
    return Check("internals", "fail", said, "remove .venv and run 'make setup' again")


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
