"""Talking to an appliance over HTTP: one client for command line, dashboard and demo.

Knows the routes and the wire types. Every failure comes out as the `HarliError` that it was on the other
side; an appliance that cannot be reached is `ApplianceUnavailable`. Does not know torch or what runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel, ValidationError

from harli_appliance.api.wire import (
    ChatChunk,
    ChatCompletion,
    Deleted,
    FileObject,
    JobEventObject,
    JobObject,
    ListOf,
    ModelObject,
    Usage,
)
from harli_appliance.errors import (
    ApplianceUnavailable,
    AuthenticationError,
    Conflict,
    DatasetError,
    EngineFault,
    HarliError,
    NotFound,
    NotReady,
    Overloaded,
    UnsupportedParameter,
    UsageError,
)
from harli_appliance.schema import PolicyChange, Status, Timeline

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0
"""For everything but chat and uploads, which take as long as they take."""

Shape = TypeVar("Shape", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class StreamedText:
    """A piece of a streamed answer, and when it arrived (`time.perf_counter`)."""

    text: str
    at: float


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The end of a streamed answer: why it ended, and how many tokens it took."""

    finish_reason: str
    usage: Usage
    at: float


class HarliClient:
    """An asynchronous client; use it with ``async with``.

    Args:
        base_url: where the appliance listens, e.g. ``http://127.0.0.1:8321``.
        api_key: sent as bearer token when given.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"'{base_url}' is no URL of an appliance; write e.g. http://127.0.0.1:8321")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HarliClient:
        # No limit on connections: a replay holds as many answers open as there are requests.
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- state of the appliance ------------------------------------------------------------------

    async def ready(self) -> bool:
        """Whether it serves; False also when it cannot be reached."""
        try:
            async with self._call("GET", "/ready"):
                return True
        except ApplianceUnavailable:
            return False

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once it serves.

        Raises:
            ApplianceUnavailable: it does not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not await self.ready():
            if time.monotonic() > deadline:
                raise ApplianceUnavailable(f"{self.base_url} did not become ready within {timeout_s:g} s")
            await asyncio.sleep(0.1)

    async def status(self) -> Status:
        return await self._get("/harli/v1/status", Status)

    async def timeline(self, since: int = 0) -> Timeline:
        return await self._get("/harli/v1/timeline", Timeline, since=since)

    async def change_policy(self, change: PolicyChange) -> Status:
        return await self._post("/harli/v1/policy", Status, change.model_dump(exclude_none=True))

    async def models(self) -> list[ModelObject]:
        return (await self._get("/v1/models", ListOf[ModelObject])).data

    async def delete_model(self, name: str) -> Deleted:
        async with self._call("DELETE", f"/v1/models/{_segment(name)}") as response:
            return Deleted.model_validate(await response.json())

    async def metrics(self) -> str:
        async with self._call("GET", "/metrics") as response:
            return await response.text()

    # -- chat ------------------------------------------------------------------------------------

    async def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any
    ) -> ChatCompletion:
        """One answer. `sampling` are further fields of the request, e.g. ``max_tokens=64``."""
        body = {"model": model, "messages": list(messages), **sampling}
        async with self._call("POST", "/v1/chat/completions", json=body, patient=True) as response:
            return ChatCompletion.model_validate(await response.json())

    async def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any
    ) -> AsyncIterator[StreamedText | StreamEnd]:
        """The pieces of an answer as they arrive, then one `StreamEnd`.

        Raises:
            EngineFault: the answer broke off before its end.
        """
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        finish_reason = None
        async with self._call("POST", "/v1/chat/completions", json=body, patient=True) as response:
            async for line in response.content:
                at = time.perf_counter()
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise _error(500, event)
                chunk = ChatChunk.model_validate(event)
                if chunk.usage is not None and finish_reason is not None:
                    yield StreamEnd(finish_reason, chunk.usage, at)
                    return
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if choice.delta.content:
                        yield StreamedText(choice.delta.content, at)
        raise EngineFault("the answer broke off; ask again", code="generation_aborted")

    # -- files and jobs --------------------------------------------------------------------------

    async def upload(self, path: Path) -> FileObject:
        """Upload a training file; the appliance checks it and refuses it whole if a line is wrong."""
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}", param="file") from error
        with file:
            form = aiohttp.FormData()
            form.add_field("purpose", "fine-tune")
            form.add_field("file", file, filename=path.name, content_type="application/jsonl")
            async with self._call("POST", "/v1/files", data=form, patient=True) as response:
                return FileObject.model_validate(await response.json())

    async def files(self) -> list[FileObject]:
        return (await self._get("/v1/files", ListOf[FileObject])).data

    async def delete_file(self, file_id: str) -> Deleted:
        async with self._call("DELETE", f"/v1/files/{_segment(file_id)}") as response:
            return Deleted.model_validate(await response.json())

    async def create_job(
        self,
        model: str,
        training_file: str,
        *,
        validation_file: str | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        priority: int | None = None,
        method: str = "supervised",
        metadata: Mapping[str, str] | None = None,
        **hyperparameters: float | str | Sequence[str] | None,
    ) -> JobObject:
        """Queue a job. `hyperparameters` are those of `api.wire.Hyperparameters`; the rest is chosen."""
        chosen = {name: value for name, value in hyperparameters.items() if value is not None}
        fields = {
            "model": model,
            "training_file": training_file,
            "validation_file": validation_file,
            "suffix": suffix,
            "seed": seed,
            "priority": priority,
            "metadata": dict(metadata) if metadata else None,
            "method": {"type": method, method: {"hyperparameters": chosen}},
        }
        body = {name: value for name, value in fields.items() if value is not None}
        return await self._post("/v1/fine_tuning/jobs", JobObject, body)

    async def jobs(self, limit: int = 20, after: str | None = None) -> ListOf[JobObject]:
        return await self._get("/v1/fine_tuning/jobs", ListOf[JobObject], limit=limit, after=after)

    async def job(self, job_id: str) -> JobObject:
        return await self._get(f"/v1/fine_tuning/jobs/{_segment(job_id)}", JobObject)

    async def events(self, job_id: str, limit: int = 20, after: str | None = None) -> ListOf[JobEventObject]:
        """Newest first, like every list; `after` continues towards the older ones."""
        path = f"/v1/fine_tuning/jobs/{_segment(job_id)}/events"
        return await self._get(path, ListOf[JobEventObject], limit=limit, after=after)

    async def cancel_job(self, job_id: str) -> JobObject:
        return await self._post(f"/v1/fine_tuning/jobs/{_segment(job_id)}/cancel", JobObject, {})

    async def pause_job(self, job_id: str) -> JobObject:
        return await self._post(f"/v1/fine_tuning/jobs/{_segment(job_id)}/pause", JobObject, {})

    async def resume_job(self, job_id: str) -> JobObject:
        return await self._post(f"/v1/fine_tuning/jobs/{_segment(job_id)}/resume", JobObject, {})

    async def set_priority(self, job_id: str, priority: int) -> JobObject:
        return await self._post(
            f"/harli/v1/jobs/{_segment(job_id)}/priority", JobObject, {"priority": priority}
        )

    async def download_adapter(self, job_id: str, into: Path) -> Path:
        """Fetch a finished job's adapter into a new folder of `into` named like the job.

        Raises:
            UsageError: the folder is there already, or cannot be made.
        """
        folder = into / job_id
        if folder.exists():
            raise UsageError(f"{folder} is there already; choose another --out", param="out")
        path = f"/v1/fine_tuning/jobs/{_segment(job_id)}/adapter"
        with tempfile.TemporaryFile() as file:
            async with self._call("GET", path, patient=True) as response:
                async for piece in response.content.iter_chunked(1 << 20):
                    await asyncio.to_thread(file.write, piece)
            file.seek(0)
            await asyncio.to_thread(_unpack, file, folder)
        return folder

    # -- the wire --------------------------------------------------------------------------------

    async def _get(self, path: str, shape: type[Shape], **query: str | int | None) -> Shape:
        params = {name: str(value) for name, value in query.items() if value is not None}
        async with self._call("GET", path, params=params) as response:
            return shape.model_validate_json(await response.read())

    async def _post(self, path: str, shape: type[Shape], body: Mapping[str, object]) -> Shape:
        async with self._call("POST", path, json=body) as response:
            return shape.model_validate_json(await response.read())

    @contextlib.asynccontextmanager
    async def _call(
        self, method: str, path: str, *, patient: bool = False, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            raise RuntimeError("use HarliClient with 'async with'")
        total = None if patient else ANSWER_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self.base_url + path, timeout=timeout, **options
            ) as response:
                if response.status >= 400:
                    raise _error(response.status, await _json(response), response.headers.get("Retry-After"))
                yield response
        except aiohttp.InvalidURL as error:
            raise UsageError(f"'{self.base_url}' is no URL of an appliance") from error
        except (ValidationError, json.JSONDecodeError) as error:  # not ours, or no JSON
            raise ApplianceUnavailable(
                f"what answers at {self.base_url} is no appliance of this version; check --url"
            ) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ApplianceUnavailable(
                f"no appliance at {self.base_url}; start one with 'harli serve', or say where with --url"
            ) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise ApplianceUnavailable(
                f"the appliance at {self.base_url} stopped answering ({reason}); see its log"
            ) from error


def _unpack(file: IO[bytes], folder: Path) -> None:
    """The files of an archive, without folders and whatever else is in it. (`extractall` has a filter for what
    an archive must not do only since Python 3.11.4.)"""
    try:
        folder.mkdir(parents=True)
        with tarfile.open(fileobj=file) as archive:
            for member in archive:
                if member.isfile() and (content := archive.extractfile(member)) is not None:
                    with (folder / Path(member.name).name).open("wb") as target:
                        shutil.copyfileobj(content, target)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; choose another --out", param="out") from error


def _segment(name: str) -> str:
    """An id as one part of a path, whatever a person typed."""
    return quote(name, safe="")


async def _json(response: aiohttp.ClientResponse) -> object:
    try:
        return await response.json(content_type=None)
    except ValueError:
        return None


_BY_STATUS: Mapping[int, type[HarliError]] = {
    401: AuthenticationError,
    404: NotFound,
    409: Conflict,
    503: ApplianceUnavailable,
}
_BY_CODE: Mapping[object, type[HarliError]] = {
    kind.default_code: kind for kind in (NotReady, UnsupportedParameter)
}


def _error(status: int, body: object, retry_after: str | None = None) -> HarliError:
    """The error that the appliance sent, as the class that it was over there."""
    detail = body.get("error") if isinstance(body, dict) else None
    if not isinstance(detail, dict):
        return ApplianceUnavailable(f"whatever answers there is no appliance (HTTP {status}); check --url")
    message, code, param = str(detail.get("message")), detail.get("code"), detail.get("param")
    if status == 429:
        return Overloaded(message, retry_after_s=float(retry_after or 1))
    if code == DatasetError.default_code:
        return DatasetError(message, findings=detail.get("findings") or ())
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status, UsageError if status < 500 else EngineFault)
    return kind(message, code=code, param=param)
