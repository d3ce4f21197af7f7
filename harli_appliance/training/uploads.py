"""Training files as they lie in the data directory: moved in whole, or not at all.

A file is first brought under a hidden name; its row is written, and then it is renamed. So at any kill a hidden
file is one whose upload ended, if there is a row of it, and else one that was not finished. Only these are swept:
a file that no row knows may be all that is left where a person moved the database away.
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
        self._own: set[str] = set()
        """Hidden names that this process gave: those files are not left over."""

    def path(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.jsonl"

    def bring_in(self, source: Path, file_id: str) -> int:
        """Move `source` here under a hidden name, its bytes on disk; its size in bytes.

        Raises:
            ApplianceUnavailable: there is no room, or the folder cannot be written; nothing is left behind.
        """
        hidden = self._hidden(file_id)
        self._own.add(hidden.name)
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
            return hidden.stat().st_size
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
        """Settle the uploads that ended processes left: those of `known` ids get their names, the others go.

        Returns the names of those that are gone.
        """
        left = [path for path in sorted(self._folder.glob(".*.incoming")) if path.name not in self._own]
        names = {self._hidden(file_id).name: self.path(file_id) for file_id in known}
        gone = [path for path in left if path.name not in names]
        for path in gone:
            path.unlink()
        for path in left:
            if path.name in names:
                path.rename(names[path.name])
        return [path.name for path in gone]

    def _hidden(self, file_id: str) -> Path:
        return self._folder / f".{file_id}.incoming"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
