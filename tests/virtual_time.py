"""An event loop whose time passes only when everybody waits: minutes take milliseconds, and nothing is timed."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")
START = 1_000_000.0
"""So small that a nanosecond is not lost in it."""


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:  # nothing is scheduled: only a thread can go on
            return super().select(None)
        self.now += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_in_virtual_time(work: Coroutine[Any, Any, Result], monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run to the end; every clock of the `time` module follows the loop."""
    with asyncio.Runner(loop_factory=_Loop) as runner, monkeypatch.context() as patched:
        loop = runner.get_loop()
        for name in ("time", "perf_counter", "monotonic"):
            patched.setattr(time, name, loop.time)
        return runner.run(work)
