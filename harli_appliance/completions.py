"""Chat completions: from a validated call to running token streams, and a usage row when each one ends.

Knows the codec, the engine, the adapters and the usage log. Does not know HTTP, nor how an answer becomes text
(`answers.py`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from harli_appliance.answers import Answer, sampling_of_choice
from harli_appliance.api.ports import ChatCall, Generation
from harli_appliance.background import Background
from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.engine.engine import Engine
from harli_appliance.engine.streams import TokenStream
from harli_appliance.errors import ApplianceUnavailable, HarliError, UsageError
from harli_appliance.runtime.grammar import check_json_schema
from harli_appliance.runtime.protocol import NewTokens, Sampling, Submission
from harli_appliance.runtime.text import TextCodec
from harli_appliance.scheduling.slo import RequestTiming
from harli_appliance.store.usage import RequestUsage, UsageLog

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the usage log wants to know about a request when it ends."""

    model: str
    prompt_tokens: int


class Completions:
    """Begins answers and records what became of them.

    Args:
        base: the base model's name; any other is an adapter's.
        context_length: tokens of prompt and answer together, at most.
    """

    def __init__(
        self,
        base: str,
        codec: TextCodec,
        engine: Engine,
        shelf: AdapterShelf,
        usage: UsageLog,
        context_length: int,
    ) -> None:
        self._base = base
        self._codec = codec
        self._engine = engine
        self._shelf = shelf
        self._usage = usage
        self._context_length = context_length
        self._asked: dict[str, _Asked] = {}
        self._writing = Background()
        self._losing = False
        engine.on_ended = self._record

    async def begin(self, call: ChatCall, require_ready: Callable[[], None]) -> Generation:
        """Begin an answer of `call.n` choices.

        Args:
            require_ready: raises when serving has ended while the call was checked.

        Raises:
            NotFound: unknown model. UsageError: it cannot be answered as asked.
            Overloaded: too many requests wait.
        """
        if call.n > self._engine.max_queued:
            raise UsageError(
                f"{call.n} choices are more than the {self._engine.max_queued} requests that may wait "
                "(server.max_queued_requests); lower n",
                param="n",
            )
        if call.json_schema is not None:
            await asyncio.to_thread(check_json_schema, call.json_schema)
        if call.logprobs is not None:
            await asyncio.to_thread(self._codec.token_bytes, 0)  # the first call is slow
        prompt = await asyncio.to_thread(  # megabytes take seconds
            self._codec.encode_chat, call.messages, most_tokens=self._context_length
        )
        # From here on nothing awaits, so that all choices run on the same version of an adapter.
        require_ready()
        sampling = self._sampling(call, len(prompt))
        streams: list[TokenStream] = []
        try:
            for choice in range(call.n):
                request = f"chatcmpl-{uuid.uuid4().hex}"
                adapter = None if call.model == self._base else self._shelf.begin(call.model, request)
                submission = Submission(request, prompt, sampling_of_choice(sampling, choice), adapter)
                try:
                    streams.append(self._engine.submit(submission, call.slo_class))
                except HarliError:
                    self._shelf.end(request)
                    raise
                self._asked[request] = _Asked(call.model, len(prompt))
        except HarliError:
            for stream in streams:
                stream.abort()
            raise
        return Answer(streams, self._codec, call.stop, len(prompt))

    async def close(self) -> None:
        """Wait until every usage row is written."""
        await self._writing.settled()

    def _sampling(self, call: ChatCall, prompt: int) -> Sampling:
        return Sampling(
            max_tokens=self._fitting(prompt, call.max_tokens),
            temperature=call.temperature,
            top_p=call.top_p,
            top_k=call.top_k,
            min_p=call.min_p,
            frequency_penalty=call.frequency_penalty,
            presence_penalty=call.presence_penalty,
            repetition_penalty=call.repetition_penalty,
            seed=call.seed,
            stop=call.stop,
            stop_token_ids=call.stop_token_ids,
            ignore_eos=call.ignore_eos,
            min_tokens=call.min_tokens,
            logprobs=call.logprobs,
            json_schema=call.json_schema,
        )

    def _fitting(self, prompt: int, wanted: int | None) -> int:
        """How many tokens the answer may have."""
        room = self._context_length - prompt
        if room < 1 or (wanted is not None and wanted > room):
            asked = f" and {wanted} of the answer" if wanted is not None else ""
            raise UsageError(
                f"{prompt} tokens of the prompt{asked} exceed the context of "
                f"{self._context_length} tokens; shorten the messages or lower max_tokens",
                code="context_length_exceeded",
                param="messages",
            )
        return wanted if wanted is not None else room

    def _record(self, item: NewTokens, timing: RequestTiming) -> None:
        self._shelf.end(item.request)
        asked = self._asked.pop(item.request, None)
        if asked is None:
            return
        usage = RequestUsage(
            id=item.request,
            model=asked.model,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=timing.tokens,
            ttft_ms=timing.ttft_ms,
            tpot_ms=timing.tpot_ms,
            finish_reason=item.finish or "stop",
            created_at=int(time.time()),
        )
        self._writing.begin(self._keep(usage))

    async def _keep(self, usage: RequestUsage) -> None:
        try:
            await self._usage.add(usage)
            self._losing = False
        except ApplianceUnavailable as error:
            if not self._losing:  # once, not for every request
                log.warning("the usage of requests is not recorded", why=error.message)
            self._losing = True
