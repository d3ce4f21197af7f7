"""``/v1/files``: upload, list, show, download, delete.

Knows multipart bodies and OpenAI's file objects. Does not know what a training file must look like: that is
checked by whoever takes the upload over.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, cast

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError
from pydantic import Field

from harli_appliance.api.bodies import Query, read_query
from harli_appliance.api.ports import FineTuning, StoredFile
from harli_appliance.api.wire import Deleted, FileObject, ListOf
from harli_appliance.config import Settings
from harli_appliance.errors import (
    ApplianceUnavailable,
    HarliError,
    NotFound,
    UnsupportedParameter,
    UsageError,
)

PIECE = 1 << 20
"""Bytes written at once."""

MAX_FIELD = 1024
"""Longest form field that is not the file, in bytes."""

MAX_FILENAME = 200

PURPOSE = "fine-tune"


class UploadTooLarge(UsageError):
    status = 413
    default_code = "file_too_large"


class FileQuery(Query):
    purpose: str | None = None
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000


class FileRoutes:
    def __init__(self, port: FineTuning, settings: Settings) -> None:
        self._port = port
        self._uploads = settings.uploads
        self._max_mib = settings.server.max_upload_mib

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/files", self.upload),
            web.get("/v1/files", self.list),
            web.get("/v1/files/{id}", self.show),
            web.delete("/v1/files/{id}", self.delete),
            web.get("/v1/files/{id}/content", self.content),
        ]

    async def upload(self, request: web.Request) -> web.Response:
        if request.content_type != "multipart/form-data":
            raise UsageError(
                f"the body is {request.content_type}; upload a file as multipart/form-data",
                code="invalid_content_type",
            )
        try:
            self._uploads.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._uploads) as folder:
                path = Path(folder) / "upload"
                filename, purpose = await self._receive(request, path)
                stored = await self._port.create_file(path, filename, purpose)
        except (ConnectionError, TimeoutError):  # of the client, not of the disk
            raise
        except OSError as error:
            raise ApplianceUnavailable(
                f"the file cannot be kept in {self._uploads}: {error.strerror}; make room there and try again",
                code="storage_unavailable",
            ) from error
        return web.json_response(file_object(stored).model_dump(mode="json"))

    async def _receive(self, request: web.Request, path: Path) -> tuple[str, str]:
        """Write the file part to `path`; its name and the purpose. Parts come in any order."""
        filename = purpose = None
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader):
                    raise UsageError("the form holds a form; send fields only", code="invalid_multipart")
                if part.name == "file" and filename is None:
                    filename = clean_filename(part.filename)
                    await self._save(part, path)
                elif part.name == "purpose" and purpose is None:
                    purpose = (await _text(part)).strip()
                else:
                    raise UsageError(
                        f"form field '{part.name}' is not supported; send 'file' and 'purpose', once each",
                        code="unknown_parameter",
                        param=part.name,
                    )
        except HarliError:
            raise
        except HttpProcessingError as error:  # of a part's headers
            raise UsageError(f"the form is malformed: {error.message}", code="invalid_multipart") from error
        except (ValueError, RuntimeError, EOFError) as error:
            raise UsageError(f"the form is malformed: {error}", code="invalid_multipart") from error
        if filename is None:
            raise UsageError("'file' is required", code="missing_parameter", param="file")
        if purpose is None:
            raise UsageError("'purpose' is required", code="missing_parameter", param="purpose")
        if purpose != PURPOSE:
            raise UnsupportedParameter(
                f"purpose '{purpose[:60]}' is not supported; use '{PURPOSE}'", param="purpose"
            )
        return filename, purpose

    async def _save(self, part: BodyPartReader, path: Path) -> None:
        """Stream to disk on a thread, so that a slow disk delays no token."""
        limit = self._max_mib << 20
        size = 0
        file = cast(BinaryIO, await asyncio.to_thread(path.open, "xb"))
        try:
            while piece := await part.read_chunk(PIECE):
                size += len(piece)
                if size > limit:
                    raise UploadTooLarge(
                        f"the file is larger than {self._max_mib} MiB; "
                        "split it, or raise server.max_upload_mib",
                        param="file",
                    )
                await asyncio.to_thread(file.write, piece)
        finally:
            file.close()

    async def list(self, request: web.Request) -> web.Response:
        query = read_query(request, FileQuery)
        files = await self._port.files()
        if query.order == "asc":
            files = files[::-1]
        if query.purpose is not None:
            files = [file for file in files if file.purpose == query.purpose]
        if query.after is not None:
            ids = [file.id for file in files]
            if query.after not in ids:
                raise NotFound(f"no file '{query.after}' to continue after", param="after")
            files = files[ids.index(query.after) + 1 :]
        page = [file_object(file) for file in files[: query.limit]]
        body = ListOf[FileObject](
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(files) > query.limit,
        )
        return web.json_response(body.model_dump(mode="json"))

    async def show(self, request: web.Request) -> web.Response:
        stored = await self._port.file(request.match_info["id"])
        return web.json_response(file_object(stored).model_dump(mode="json"))

    async def delete(self, request: web.Request) -> web.Response:
        await self._port.delete_file(request.match_info["id"])
        return web.json_response(Deleted(id=request.match_info["id"], object="file").model_dump(mode="json"))

    async def content(self, request: web.Request) -> web.StreamResponse:
        path = await self._port.file_path(request.match_info["id"])
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})


async def _text(part: BodyPartReader) -> str:
    raw = bytearray()
    while piece := await part.read_chunk(MAX_FIELD):
        raw += piece
        if len(raw) > MAX_FIELD:
            raise UsageError(f"form field '{part.name}' is too long", param=part.name)
    return raw.decode("utf-8")


def clean_filename(name: str | None) -> str:
    """The last part of the client's name without control characters: it is shown, never opened."""
    last = PurePosixPath((name or "").replace("\\", "/")).name
    shown = re.sub(r"[\x00-\x1f\x7f]", "", last)[:MAX_FILENAME]
    return shown if shown.strip(". ") else "upload.jsonl"


def file_object(stored: StoredFile) -> FileObject:
    return FileObject(
        id=stored.id,
        bytes=stored.bytes,
        created_at=stored.created_at,
        filename=stored.filename,
        purpose=stored.purpose,
    )
