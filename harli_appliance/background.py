"""Work on the event loop that goes on when nobody waits for it any more, as when a client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Keeps tasks from being collected, and knows which are not done yet."""

    def __init__(self) -> None:
        self._unfinished: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return task

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which goes on when the caller is cancelled."""
        return await asyncio.shield(self.begin(work))

    async def settled(self) -> None:
        """Wait for what is under way, however it ends."""
        await asyncio.gather(*self._unfinished, return_exceptions=True)
