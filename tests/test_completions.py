"""What becomes of a request's usage when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs

from harli_appliance.completions import Completions, _Asked
from harli_appliance.errors import ApplianceUnavailable


async def test_usage_that_cannot_be_recorded_is_warned_of_once_in_a_row() -> None:
    full, kept, engine = True, [], SimpleNamespace()

    async def add(usage: Any) -> None:
        if full:
            raise ApplianceUnavailable("the disk is full")
        kept.append(usage.id)

    nobody: Any = SimpleNamespace(end=lambda request: None)
    log: Any = SimpleNamespace(add=add)
    completions = Completions("tiny", nobody, engine, nobody, log, 64)  # type: ignore[arg-type]

    async def end(request: str) -> None:
        completions._asked[request] = _Asked("tiny", 3)
        timing = SimpleNamespace(tokens=4, ttft_ms=1.0, tpot_ms=1.0)
        engine.on_ended(SimpleNamespace(request=request, finish="stop"), timing)
        (task,) = completions._writing._unfinished
        await completions.close()
        assert task.exception() is None

    with capture_logs() as told:
        await end("a")
        await end("b")
        full = False
        await end("c")
        full = True
        await end("d")
    assert kept == ["c"]
    assert [line["why"] for line in told] == ["the disk is full"] * 2
