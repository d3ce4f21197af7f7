"""The appliance as a benchmark uses it: over HTTP (`client.HarliClient`) or in the same process, through its port.

Knows both faces and makes the second look like the first. Does not know what is measured.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harli_appliance.api.ports import AppliancePort, ChatCall, JobSpec
from harli_appliance.api.wire import Usage
from harli_appliance.client import StreamedText, StreamEnd
from harli_appliance.schema import PolicyChange, Status, Timeline


class Identified(Protocol):
    @property
    def id(self) -> str: ...


class Chat(Protocol):
    """What `replay` needs."""

    def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any
    ) -> AsyncIterator[StreamedText | StreamEnd]: ...


class System(Chat, Protocol):
    """What a comparison needs; see `HarliClient` for each."""

    async def status(self) -> Status: ...
    async def timeline(self, since: int = 0) -> Timeline: ...
    async def change_policy(self, change: PolicyChange) -> Status: ...
    async def upload(self, path: Path) -> Identified: ...
    async def create_job(
        self, model: str, training_file: str, *, n_epochs: int, batch_size: int
    ) -> Identified: ...


class InProcess:
    """An appliance in this process, without HTTP."""

    def __init__(self, appliance: AppliancePort) -> None:
        self._appliance = appliance

    async def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any
    ) -> AsyncIterator[StreamedText | StreamEnd]:
        """As `HarliClient.stream_chat`; `sampling` are fields of `ChatCall`."""
        answer = await self._appliance.chat(ChatCall(model, messages, **sampling))
        tokens, reason = 0, "stop"
        try:
            async for delta in answer:
                tokens += delta.tokens
                reason = delta.finish_reason or reason
                if delta.text:
                    yield StreamedText(delta.text, time.perf_counter())
        finally:
            answer.abort()
        prompt = answer.prompt_tokens
        usage = Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)
        yield StreamEnd(reason, usage, time.perf_counter())

    async def status(self) -> Status:
        return await self._appliance.status()

    async def timeline(self, since: int = 0) -> Timeline:
        return self._appliance.timeline(since)

    async def change_policy(self, change: PolicyChange) -> Status:
        return await self._appliance.change_policy(change)

    async def upload(self, path: Path) -> Identified:
        # The appliance keeps the file that it is given.
        with tempfile.NamedTemporaryFile(suffix=path.suffix, delete=False) as copy:
            shutil.copyfile(path, copy.name)
        return await self._appliance.finetuning.create_file(Path(copy.name), path.name, "fine-tune")

    async def create_job(
        self, model: str, training_file: str, *, n_epochs: int, batch_size: int
    ) -> Identified:
        spec = JobSpec(model, training_file, n_epochs=n_epochs, batch_size=batch_size)
        return await self._appliance.finetuning.create_job(spec)
