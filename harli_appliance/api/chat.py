"""``/v1/chat/completions`` and ``/v1/models``.

Knows OpenAI's answers, plain and streamed. Does not know how text is made. A client that goes away cancels
the handler, and a cancelled handler aborts its generation, so that nobody computes for an empty seat.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from aiohttp import web

from harli_appliance.api.auth import CLASS_OF_KEY
from harli_appliance.api.bodies import read_body
from harli_appliance.api.chat_request import TIER_OF_CLASS, ChatRequest
from harli_appliance.api.errors import error_detail, request_id, unexpected
from harli_appliance.api.ports import AppliancePort, FinishReason, Generation, Logprob
from harli_appliance.api.wire import (
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    ListOf,
    ModelHarli,
    ModelObject,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from harli_appliance.errors import EngineFault, HarliError, NotFound, NotReady
from harli_appliance.schema import ModelView

log = structlog.get_logger(__name__)

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy that buffers would spoil the latency that we promise
}


GRACE_S = 5.0
"""How long answers in flight may go on when the server stops."""


class ChatRoutes:
    def __init__(self, port: AppliancePort) -> None:
        self._port = port
        self._started = int(time.time())
        self._running: set[Generation] = set()
        self._none_running = asyncio.Event()
        self._none_running.set()

    async def finish(self, app: web.Application) -> None:
        """The server stops: let answers in flight end, then end those that go on. Their clients are told."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_running.wait(), GRACE_S)
        for generation in self._running:
            generation.abort()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/v1/models/{id:.+}", self.model),
            web.post("/v1/chat/completions", self.chat),
        ]

    async def models(self, request: web.Request) -> web.Response:
        models = [self._model(view) for view in self._port.models()]
        return web.json_response(ListOf[ModelObject](data=models).model_dump(mode="json"))

    async def model(self, request: web.Request) -> web.Response:
        wanted = request.match_info["id"]
        for view in self._port.models():
            if view.id == wanted:
                return web.json_response(self._model(view).model_dump(mode="json"))
        raise NotFound(
            f"no model '{wanted}'; GET /v1/models lists them", code="model_not_found", param="model"
        )

    def _model(self, view: ModelView) -> ModelObject:
        harli = ModelHarli(kind=view.kind, parent=view.parent, job=view.job)
        return ModelObject(id=view.id, created=self._started, harli=harli)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, ChatRequest)
        if not self._port.ready():
            raise NotReady("the appliance does not serve yet; GET /ready says when")
        call = body.call(request.get(CLASS_OF_KEY, "standard"))
        generation = await self._port.chat(call)
        self._running.add(generation)
        self._none_running.clear()
        try:
            answer = Answer(body, generation, TIER_OF_CLASS[call.slo_class])
            return await (answer.stream(request) if body.stream else answer.whole())
        finally:
            generation.abort()
            self._running.remove(generation)
            if not self._running:
                self._none_running.set()


class Answer:
    """One answer on its way out: the generation, and the names under which its pieces go to the client."""

    def __init__(self, body: ChatRequest, generation: Generation, tier: str) -> None:
        self._body = body
        self._tier = tier
        self._generation = generation
        self._tokens = 0
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> web.Response:
        texts: list[list[str]] = [[] for _ in range(self._body.choices)]
        logprobs: list[list[Logprob]] = [[] for _ in texts]
        ends: dict[int, FinishReason] = {}
        async for delta in self._generation:
            self._tokens += delta.tokens
            texts[delta.choice].append(delta.text)
            logprobs[delta.choice].extend(delta.logprobs)
            if delta.finish_reason is not None:
                ends[delta.choice] = delta.finish_reason
        self._require_all(ends)
        completion = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            choices=[
                Choice(
                    index=index,
                    message=AssistantMessage(content="".join(texts[index])),
                    logprobs=self._logprobs(logprobs[index]),
                    finish_reason=ends[index],
                )
                for index in range(len(texts))
            ],
            usage=self._usage(),
            service_tier=self._tier,
        )
        return web.json_response(completion.model_dump(mode="json"))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events. Nothing is sent before the first token: until then a failure has a status."""
        deltas = aiter(self._generation)
        delta = await anext(deltas, None)
        if delta is None:
            raise _cut_short()
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        ends: dict[int, FinishReason] = {}
        try:
            for index in range(self._body.choices):
                opening = Delta(role="assistant", content="")
                await self._send(response, ChunkChoice(index=index, delta=opening))
            while delta is not None:
                self._tokens += delta.tokens
                if delta.text or delta.logprobs:
                    piece = Delta(content=delta.text)
                    logprobs = self._logprobs(delta.logprobs)
                    await self._send(
                        response, ChunkChoice(index=delta.choice, delta=piece, logprobs=logprobs)
                    )
                if delta.finish_reason is not None:
                    ends[delta.choice] = delta.finish_reason
                    end = ChunkChoice(index=delta.choice, delta=Delta(), finish_reason=delta.finish_reason)
                    await self._send(response, end)
                delta = await anext(deltas, None)
            self._require_all(ends)
            if self._body.include_usage:
                await response.write(self._event(self._chunk([], self._usage())))
            await response.write(b"data: [DONE]\n\n")
        except ConnectionResetError:
            return response  # the client left between two tokens
        except HarliError as error:
            await self._fail(request, response, error)
        except Exception:
            log.exception("answer failed in the middle", request_id=request_id(request))
            await self._fail(request, response, unexpected(request))
        await response.write_eof()
        return response

    def _require_all(self, ends: Mapping[int, FinishReason]) -> None:
        if len(ends) < self._body.choices:
            raise _cut_short()

    def _logprobs(self, found: Sequence[Logprob]) -> ChoiceLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChoiceLogprobs(
            content=[
                TokenLogprob(**_token(entry), top_logprobs=[TopLogprob(**_token(top)) for top in entry.top])
                for entry in found
            ]
        )

    async def _fail(self, request: web.Request, response: web.StreamResponse, error: HarliError) -> None:
        """The status line is long gone: say it as an event, and leave [DONE] out."""
        log.warning("answer cut short", request_id=request_id(request), error=str(error))
        await response.write(f"data: {json.dumps({'error': error_detail(error)})}\n\n".encode())

    async def _send(self, response: web.StreamResponse, choice: ChunkChoice) -> None:
        await response.write(self._event(self._chunk([choice])))

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._body.model,
            choices=choices,
            usage=usage,
            service_tier=self._tier,
        )

    def _event(self, chunk: ChatChunk) -> bytes:
        data = chunk.model_dump(mode="json")
        for choice in data["choices"]:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        if not self._body.include_usage:
            del data["usage"]
        return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

    def _usage(self) -> Usage:
        prompt = self._generation.prompt_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self._tokens,
            total_tokens=prompt + self._tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._generation.cached_tokens),
        )


def _token(entry: Logprob) -> dict[str, Any]:
    """A token as OpenAI shows it: its bytes, and as text, where a part of a character becomes U+FFFD."""
    text = entry.token.decode("utf-8", "replace")
    return {"token": text, "logprob": entry.logprob, "bytes": list(entry.token)}


def _cut_short() -> EngineFault:
    return EngineFault("the answer ended before it was complete; ask again", code="generation_aborted")
