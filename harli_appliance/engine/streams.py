"""The way back of a request: from the engine's ticks to whoever awaits its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from harli_appliance.errors import EngineFault
from harli_appliance.runtime.protocol import NewTokens


class TokenStream:
    """Tokens of one request, in order; iterate to the end or `abort`.

    Iteration ends after the item that carries `finish`. A request that the runtime ended on its own raises
    `EngineFault`; one that was aborted here just ends.
    """

    def __init__(self, request: str, on_abort: Callable[[str], None]) -> None:
        self.request = request
        self._on_abort = on_abort
        self._items: asyncio.Queue[NewTokens] = asyncio.Queue()
        self._ended = False
        self._aborted = False

    def push(self, item: NewTokens) -> None:
        self._items.put_nowait(item)

    def abort(self) -> None:
        """Stop the request wherever it is; idempotent."""
        if not (self._ended or self._aborted):
            self._aborted = True
            self._on_abort(self.request)

    @property
    def aborted(self) -> bool:
        return self._aborted

    async def __aiter__(self) -> AsyncIterator[NewTokens]:
        while not self._ended:
            item = await self._items.get()
            if item.finish in ("abort", "error"):
                self._ended = True
                if not self._aborted:
                    raise EngineFault(f"the request could not be finished: {item.error or 'aborted'}")
                return
            self._ended = item.finish is not None
            yield item
