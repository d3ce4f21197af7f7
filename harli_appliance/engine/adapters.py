"""The adapters that can be asked for by name: loaded, replaced and unloaded while requests are served.

A name stands for its newest version. A new version is loaded under an id of its own; requests that began on the
old one finish on it, and it is unloaded when the last of them has ended. Lives on the event loop; the runtime is
touched on the inference lane, between two steps.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from harli_appliance.background import Background
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import HarliError, NotFound, UsageError
from harli_appliance.runtime.protocol import Runtime

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class Version:
    """One loaded version of an adapter. `job` is the finetuning job that made it, if one did."""

    name: str
    adapter_id: str
    folder: Path
    job: str | None
    users: set[str] = field(default_factory=set)
    retired: bool = False


class AdapterShelf:
    """Names and versions of the adapters of one runtime."""

    def __init__(self, runtime: Runtime, lane: Lane) -> None:
        self._runtime = runtime
        self._lane = lane
        self._current: dict[str, Version] = {}
        self._kept_off: set[str] = set()
        self._using: dict[str, Version] = {}
        self._changing = asyncio.Lock()
        self._background = Background()

    @property
    def versions(self) -> tuple[Version, ...]:
        """The current version of every adapter, in the order of their first loading."""
        return tuple(self._current.values())

    async def put(self, name: str, folder: Path, job: str | None = None) -> Version:
        """Load an adapter, in the place of the version that had this name.

        Raises:
            UsageError: its files, rank or targets do not fit; what was served before still is.
        """
        return await self._background.to_the_end(
            self._put(name, folder, job)
        )  # what SGLang loads has a name then

    async def _put(self, name: str, folder: Path, job: str | None) -> Version:
        async with self._changing:
            version = Version(name, f"{name}#{uuid.uuid4().hex[:8]}", folder, job)
            files = await asyncio.to_thread(self._runtime.read_adapter, name, str(folder))
            await self._lane.run(self._runtime.load_adapter, version.adapter_id, files)
            before = self._current.get(name)
            self._current[name] = version
            if before is not None:
                self._retire(before)
            return version

    async def remove(self, name: str) -> None:
        """Take a name away; requests in flight on it finish.

        Raises:
            NotFound: there is no such adapter.
        """
        async with self._changing:
            self._retire(self._known(name))
            del self._current[name]

    async def forget(self, name: str) -> None:
        """Nothing has this name any more, if anything had; requests in flight on it finish."""
        async with self._changing:
            self._kept_off.discard(name)
            if (version := self._current.pop(name, None)) is not None:
                self._retire(version)

    def keep_off(self, name: str) -> None:
        """This name stands for an adapter that cannot be served; whoever asks for it is told so."""
        self._kept_off.add(name)

    def begin(self, name: str, request: str) -> str:
        """The id that this request is served with; `end` must be called when it is over.

        Raises:
            NotFound: there is no such adapter.
            UsageError: there is, but it cannot be served.
        """
        version = self._known(name)
        version.users.add(request)
        self._using[request] = version
        return version.adapter_id

    def end(self, request: str) -> None:
        """A request is over; one that used no adapter is none of our business."""
        version = self._using.pop(request, None)
        if version is None:
            return
        version.users.discard(request)
        if version.retired and not version.users:
            self._unload(version)

    async def close(self) -> None:
        await self._background.settled()

    def _known(self, name: str) -> Version:
        if name in self._kept_off and name not in self._current:
            raise UsageError(
                f"model {name!r} is no LoRA adapter and cannot be served; fetch it with 'harli jobs download'",
                code="model_not_servable",
                param="model",
            )
        if name not in self._current:
            raise NotFound(
                f"model {name!r} does not exist; GET /v1/models lists those that do",
                code="model_not_found",
                param="model",
            )
        return self._current[name]

    def _retire(self, version: Version) -> None:
        version.retired = True
        if not version.users:
            self._unload(version)

    def _unload(self, version: Version) -> None:
        self._background.begin(self._unload_now(version))

    async def _unload_now(self, version: Version) -> None:
        try:
            await self._lane.run(self._runtime.unload_adapter, version.adapter_id, version.name)
        except HarliError as error:  # it stays loaded and unused: memory is lost, answers are not
            log.error("an adapter cannot be unloaded", adapter=version.name, why=error.message)
