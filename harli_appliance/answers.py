"""A chat completion on its way from the engine to the API: its choices, as text.

Knows token streams, decoding and the API's port; does not know where requests come from or who reads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from harli_appliance.api.ports import FinishReason, Generation, Logprob, TextDelta
from harli_appliance.engine.streams import TokenStream
from harli_appliance.runtime.protocol import NewTokens, Sampling, TokenLogprob
from harli_appliance.runtime.text import Decoder, TextCodec

LEAST_LOGPROB = -9999.0
"""What stands for an impossible token, as in OpenAI's API: JSON has no infinity."""


def sampling_of_choice(sampling: Sampling, choice: int) -> Sampling:
    """How choice number `choice` is drawn: as the first, with a seed of its own if there is one."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice + 2**63) % 2**64 - 2**63)  # stays an int64


class Answer(Generation):
    """One or more choices that run at the same time.

    Args:
        streams: one for each choice, in order.
        stop: strings that end a choice and are left out of it.
    """

    def __init__(
        self, streams: Sequence[TokenStream], codec: TextCodec, stop: Sequence[str], prompt_tokens: int
    ) -> None:
        self._choices = [
            _Choice(index, stream, codec, codec.decoder(stop)) for index, stream in enumerate(streams)
        ]
        self._prompt_tokens = prompt_tokens
        self._pumps: list[asyncio.Task[None]] = []

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self._choices[0].cached_tokens

    def abort(self) -> None:
        for choice in self._choices:
            choice.stream.abort()
        for pump in self._pumps:
            pump.cancel()

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        if len(self._choices) == 1:
            return self._choices[0].deltas()
        return self._interleaved()

    async def _interleaved(self) -> AsyncIterator[TextDelta]:
        """Deltas of all choices as they come; the first failure ends them all."""
        arrived: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue()
        self._pumps = [asyncio.create_task(_pump(choice, arrived)) for choice in self._choices]
        for pump in self._pumps:  # also one that is aborted ends: somebody may still read
            pump.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            running = len(self._choices)
            while running:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            self.abort()


async def _pump(choice: _Choice, arrived: asyncio.Queue[TextDelta | Exception | None]) -> None:
    try:
        async for delta in choice.deltas():
            arrived.put_nowait(delta)
    except Exception as error:
        arrived.put_nowait(error)


class _Choice:
    """One of a completion's answers: its tokens so far, on their way to text."""

    def __init__(self, index: int, stream: TokenStream, codec: TextCodec, decoder: Decoder) -> None:
        self.stream = stream
        self.cached_tokens = 0
        self._index = index
        self._codec = codec
        self._decoder = decoder
        self._unreported: deque[tuple[int, TokenLogprob]] = deque()
        self._reported = 0

    async def deltas(self) -> AsyncIterator[TextDelta]:
        pending = 0
        async for item in self.stream:
            self.cached_tokens = item.cached_tokens or self.cached_tokens
            text = self._decoder.push(item.tokens)
            pending += len(item.tokens)
            finish: FinishReason | None = None
            if item.finish is not None:
                text += self._decoder.finish()
                finish = "length" if item.finish == "length" else "stop"
            logprobs = self._logprobs(item)
            if text or finish:
                yield TextDelta(text, pending, finish, self._index, logprobs)
                pending = 0

    def _logprobs(self, item: NewTokens) -> tuple[Logprob, ...]:
        """Of the tokens whose text is out by now: a stop string's and the end token's are never reported."""
        if not item.logprobs and not self._unreported:
            return ()
        self._unreported.extend(zip(item.tokens, item.logprobs, strict=True))
        ready = len(self._unreported) if item.finish == "length" else self._decoder.settled - self._reported
        self._reported += ready
        return tuple(self._described(*self._unreported.popleft()) for _ in range(ready))

    def _described(self, token: int, found: TokenLogprob) -> Logprob:
        top = tuple(Logprob(self._codec.token_bytes(other), value) for other, value in found.top)
        return Logprob(self._codec.token_bytes(token), max(found.logprob, LEAST_LOGPROB), top)
