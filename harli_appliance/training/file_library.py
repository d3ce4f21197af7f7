"""The training files of a data directory: checked, taken over whole, and kept while a job needs them.

Every method has its effect on disk when it returns; a caller that goes away in the middle (a client that hangs up)
leaves nothing half done. Knows rows, bytes and what a data set must be; knows no jobs.
"""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePath

import structlog
from sqlite_utils import Database as Connection

from harli_appliance.api.ports import StoredFile
from harli_appliance.background import Background
from harli_appliance.config import Settings
from harli_appliance.errors import DatasetError, NotFound, UsageError
from harli_appliance.store import files as file_rows
from harli_appliance.store.database import Database
from harli_appliance.store.ids import new_id
from harli_appliance.training.dataset import MIB, CountTokens, check_dataset
from harli_appliance.training.findings import Report
from harli_appliance.training.uploads import UploadFolder

PURPOSE = "fine-tune"

log = structlog.get_logger(__name__)


class FileLibrary:
    """Files of one data directory.

    Args:
        count_tokens: tells how long an example is; without it no length is checked.
        context_length: tokens that an example may have at most.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        count_tokens: CountTokens | None = None,
        context_length: int | None = None,
    ) -> None:
        self._database = database
        self._settings = settings
        self._count_tokens = count_tokens
        self._context_length = context_length
        self._uploads = UploadFolder(settings.files)
        self._background = Background()

    async def create_file(self, path: Path, filename: str, purpose: str) -> StoredFile:
        """Check the upload at `path` and take it over; on an error it is still the caller's to delete.

        Raises:
            UsageError: the purpose is not fine-tune.
            DatasetError: the file is no good; carries the findings.
        """
        if purpose != PURPOSE:
            raise UsageError(f"purpose '{purpose}' is not supported; use '{PURPOSE}'", param="purpose")
        report = await asyncio.to_thread(
            check_dataset,
            path,
            count_tokens=self._count_tokens,
            context_length=self._context_length,
            max_file_bytes=self._settings.server.max_upload_mib * MIB,
        )
        if not report.ok:
            raise DatasetError(_refusal(report), findings=report.errors)
        return await self._background.to_the_end(self._take_over(path, filename, report))

    async def _take_over(self, path: Path, filename: str, report: Report) -> StoredFile:
        file_id = new_id("file")
        name = one_line(PurePath(filename).name)[:255] or "upload.jsonl"
        size = await asyncio.to_thread(self._uploads.bring_in, path, file_id)

        def keep(db: Connection) -> StoredFile:
            return file_rows.insert_file(db, file_id, name, PURPOSE, size, report.examples, report.format)

        try:
            file = await self._database.run(keep)
        except BaseException:
            self._uploads.discard(file_id)
            raise
        await asyncio.to_thread(self._uploads.reveal, file_id)
        return file

    async def files(self) -> list[StoredFile]:
        return await self._database.run(file_rows.list_files)

    async def file(self, file_id: str) -> StoredFile:
        return await self._database.run(lambda db: file_rows.get_file(db, file_id))

    async def file_path(self, file_id: str) -> Path:
        """Where the bytes of a file lie.

        Raises:
            NotFound: there is no such file, or someone removed its bytes.
        """
        path = self._uploads.path((await self.file(file_id)).id)
        if not await asyncio.to_thread(path.is_file):
            raise NotFound(f"the content of file '{file_id}' is gone from {path}; upload it again")
        return path

    async def delete_file(self, file_id: str) -> None:
        """Remove a file that no job needs any more."""
        await self._background.to_the_end(self._delete_file(file_id))

    async def _delete_file(self, file_id: str) -> None:
        await self._database.run(lambda db: file_rows.delete_file(db, file_id))
        await asyncio.to_thread(self._uploads.discard, file_id)

    async def _sweep(self, known: list[str]) -> None:
        """Settle what earlier processes left half done; files that no row knows otherwise stay."""
        for name in await asyncio.to_thread(self._uploads.sweep, known):
            log.warning("removed an unfinished upload", file=name)

    async def close(self) -> None:
        """Wait for what callers that went away have left under way."""
        await self._background.settled()


def _refusal(report: Report) -> str:
    first, *more = report.errors
    others = f" (and {len(more)} more; `harli data check` lists them)" if more else ""
    return f"the training file is refused: line {first.line}: {first.message}{others}"


def one_line(text: str) -> str:
    """Text that SQLite can keep and a terminal can print: one line, no half characters."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
