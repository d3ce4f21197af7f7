"""Training files as they lie in the data directory: moved in whole, or not at all.

A file is first brought under a hidden name, then renamed in the same transaction that writes its row, so
that at any kill there is a row with its file, or a file without a row, which the next start sweeps away.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from harli_appliance.errors import ApplianceUnavailable


class UploadFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.jsonl"

    def bring_in(self, source: Path, file_id: str) -> None:
        """Move `source` here under a hidden name, its bytes on disk.

        Raises:
            ApplianceUnavailable: there is no room, or the folder cannot be written; nothing is left behind.
        """
        hidden = self._hidden(file_id)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                source.rename(hidden)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.copyfile(source, hidden)  # another file system
                source.unlink()
            hidden.chmod(0o600)
            _sync(hidden)
        except OSError as error:
            self.discard(file_id)
            raise ApplianceUnavailable(
                f"the file cannot be kept in {self._folder}: {error.strerror}; make room there and try again",
                code="storage_unavailable",
            ) from error

    def reveal(self, file_id: str) -> None:
        """Give a file that was brought in its name, for good."""
        self._hidden(file_id).rename(self.path(file_id))
        _sync(self._folder)

    def discard(self, file_id: str) -> None:
        """Remove whatever there is of a file."""
        for path in (self._hidden(file_id), self.path(file_id)):
            path.unlink(missing_ok=True)

    def sweep(self, known: Collection[str]) -> list[str]:
        """Remove what an interrupted upload or removal left: everything not `known`. Returns the names."""
        keep = {self.path(file_id).name for file_id in known}
        left = sorted(path for path in self._folder.glob("*") if path.name not in keep and path.is_file())
        for path in left:
            path.unlink()
        return [path.name for path in left]

    def _hidden(self, file_id: str) -> Path:
        return self._folder / f".{file_id}.incoming"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
