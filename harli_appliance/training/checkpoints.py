"""Checkpoints of a running job: written whole or not at all, and refused when a byte is wrong.

A checkpoint is a folder ``step-NNNNNN`` with ``state.safetensors`` and ``manifest.json``: a line of JSON (step,
progress, SHA-256 of the tensors) and the SHA-256 of that line. It is written beside its place, flushed to disk and
renamed, so that a power cut leaves either the old ones or the new one. Knows files and tensors, not training.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.training.validation import Standing

log = structlog.get_logger(__name__)

_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job was: optimizer steps done, tokens trained, last loss, what validation has shown."""

    step: int
    trained_tokens: int
    loss: float | None
    standing: Standing = field(default_factory=Standing)


def write_atomically(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a new folder that appears as `folder`, complete and durable.

    An existing `folder` is replaced.

    Raises:
        ApplianceUnavailable: the disk is full or cannot be written; what was written is removed.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:  # of a write, the latter is an OSError in other words
        shutil.rmtree(partial, ignore_errors=True)
        raise ApplianceUnavailable(
            f"{folder} cannot be written: {error}; make room on its disk", code="storage_unavailable"
        ) from error


def save(home: Path, progress: Progress, tensors: Mapping[str, Tensor], keep: int) -> Path:
    """Write a checkpoint of `tensors` and drop all but the newest `keep`. Those of later steps go too: a job that
    makes these steps again found them damaged.

    Raises:
        ApplianceUnavailable: see `write_atomically`.
    """

    def fill(folder: Path) -> None:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / _TENSORS)
        manifest = json.dumps({**asdict(progress), "sha256": _digest(folder / _TENSORS)}).encode()
        (folder / _MANIFEST).write_bytes(manifest + b"\n" + _sealed(manifest))

    folder = _folder(home, progress.step)
    write_atomically(folder, fill)
    later = [other for other in _folders(home) if _number(other) > _number(folder)]
    for old in [*later, *_folders(home)[len(later) + keep :]]:
        discard(old)
    return folder


def load_newest(home: Path) -> tuple[Progress, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole, None when there is none; damaged ones are passed over.

    Raises:
        ApplianceUnavailable: the disk does not let one be read.
    """
    return next(filter(None, map(_load, _folders(home))), None)


def load_step(home: Path, step: int) -> dict[str, Tensor] | None:
    """The tensors of the checkpoint of `step`; None when there is none or it is damaged.

    Raises:
        ApplianceUnavailable: the disk does not let it be read.
    """
    found = _load(_folder(home, step))
    return None if found is None else found[1]


def _load(folder: Path) -> tuple[Progress, dict[str, Tensor]] | None:
    try:
        line, _, seal = (folder / _MANIFEST).read_bytes().rpartition(b"\n")
        if seal != _sealed(line):
            raise ValueError("its manifest is not as it was written")
        manifest = json.loads(line)
        if manifest.pop("sha256") != _digest(folder / _TENSORS):
            raise ValueError("its tensors do not match the manifest")
        standing = Standing(**manifest.pop("standing"))
        return Progress(**manifest, standing=standing), load_file(folder / _TENSORS)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # it may be whole
            raise ApplianceUnavailable(
                f"{folder} cannot be read: {error.strerror or error}; check its disk",
                code="storage_unavailable",
            ) from error
        log.warning("checkpoint is damaged; trying the one before", folder=str(folder), why=str(error))
        return None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("checkpoint is damaged; trying the one before", folder=str(folder), why=str(error))
        return None


def remove(home: Path, step: int) -> None:
    """Remove the checkpoint of `step`, if there is one."""
    shutil.rmtree(_folder(home, step), ignore_errors=True)


def sweep(root: Path, ended: Container[str]) -> None:
    """Remove the checkpoints in `root` of the jobs `ended`; those of jobs that nobody knows stay."""
    for home in root.glob("*"):
        if home.name in ended:
            discard(home)


def discard(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)


def _folder(home: Path, step: int) -> Path:
    return home / f"step-{step:06d}"


def _folders(home: Path) -> list[Path]:
    """Newest first, by number: from step 1,000,000 on names are longer."""
    return sorted(home.glob("step-*"), key=_number, reverse=True)


def _number(folder: Path) -> tuple[int, str]:
    """Orders by the step's number."""
    return len(folder.name), folder.name


def _sealed(manifest: bytes) -> bytes:
    return hashlib.sha256(manifest).hexdigest().encode()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
