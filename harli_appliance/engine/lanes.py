"""Lanes: where work runs. On a CPU a lane is one thread pinned to its own cores.

A lane runs one thing at a time, in order, and keeps count of how long it was busy. Knows threads and cores, not
what runs on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Lane:
    """One worker thread.

    Args:
        cores: CPU cores the thread may use; None leaves it free.
        around: entered around everything that runs, e.g. the lane's CUDA stream.
        finish: waits, on the lane's thread, until the device has done all that was launched; None when what ran is
            over as soon as it returns.
        works_on: whether the device still has something to do of what was launched; from any thread.
    """

    def __init__(
        self,
        name: str,
        cores: Sequence[int] | None = None,
        around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        finish: Callable[[], None] | None = None,
        works_on: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.cores = tuple(cores) if cores is not None else None
        self._around = around
        self._finish = finish
        self._works_on = works_on
        self._lock = threading.Lock()
        self._busy_s = 0.0
        self._since: float | None = None
        self._running = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._start)

    def _start(self) -> None:
        if self.cores is not None:
            os.sched_setaffinity(0, self.cores)  # 0 is the calling thread on Linux

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._executor.submit(self._timed, partial(function, *args, **kwargs))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run on the lane and wait; cancelling the wait does not stop what runs."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    async def drain(self) -> None:
        """Wait until everything that was run before is over on the device too."""
        if self._finish is not None:
            await self.run(self._finish)

    def busy_s(self) -> float:
        """Seconds that the lane has been busy since it was made, work in progress included: also the device's,
        while the thread has nothing to do."""
        with self._lock:
            self._look(time.perf_counter())
            return self._busy_s

    def _look(self, now: float) -> None:
        """Count up to `now`. A device that is found to be done was so at some time since the last look, up to
        which it counts."""
        if self._since is not None:
            if self._running or self._works_on():
                self._busy_s += now - self._since
                self._since = now
            else:
                self._since = None

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _timed(self, work: Callable[[], T]) -> T:
        self._look_and_run(True)
        try:
            with self._around():
                return work()
        finally:
            self._look_and_run(False)

    def _look_and_run(self, running: bool) -> None:
        with self._lock:
            self._look(now := time.perf_counter())
            self._since, self._running = now, running
