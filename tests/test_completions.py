"""From a call to running requests: what is refused before anything is begun, and what becomes of usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from harli_appliance.api.ports import ChatCall
from harli_appliance.completions import Completions, _Asked
from harli_appliance.engine.streams import TokenStream
from harli_appliance.errors import ApplianceUnavailable, UsageError
from harli_appliance.runtime.protocol import Submission

HELLO = ({"role": "user", "content": "hello"},)


class NotingEngine:
    max_queued = 3

    def __init__(self) -> None:
        self.submitted: list[Submission] = []

    def submit(self, submission: Submission, slo_class: str) -> TokenStream:
        self.submitted.append(submission)
        return TokenStream(submission.id, lambda _: None)


class NotingCodec:
    """Encodes everything as three tokens."""

    def __init__(self) -> None:
        self.most: list[int | None] = []

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, most_tokens: int | None = None
    ) -> list[int]:
        self.most.append(most_tokens)
        return [1, 2, 3]

    def decoder(self, stop: Sequence[str] = ()) -> Any:
        return SimpleNamespace()


@pytest.fixture
def engine() -> NotingEngine:
    return NotingEngine()


def completions(engine: NotingEngine, codec: NotingCodec) -> Completions:
    unused: Any = SimpleNamespace()
    return Completions("base", codec, engine, unused, unused, 1000)  # type: ignore[arg-type]


async def test_more_choices_than_may_ever_wait_are_no_reason_to_try_again(engine: NotingEngine) -> None:
    asked = completions(engine, NotingCodec())
    await asked.begin(ChatCall("base", HELLO, n=3), lambda: None)
    assert len(engine.submitted) == 3
    with pytest.raises(
        UsageError, match=r"4 choices .* 3 requests .*max_queued_requests.*lower n"
    ) as refusal:
        await asked.begin(ChatCall("base", HELLO, n=4), lambda: None)
    assert (refusal.value.status, refusal.value.param) == (400, "n")
    assert len(engine.submitted) == 3


async def test_the_codec_is_told_how_much_can_fit(engine: NotingEngine) -> None:
    codec = NotingCodec()
    await completions(engine, codec).begin(ChatCall("base", HELLO), lambda: None)
    assert codec.most == [1000]


async def test_usage_that_cannot_be_recorded_is_warned_of_once_in_a_row() -> None:
    full, kept, engine = True, [], SimpleNamespace()

    async def add(usage: Any) -> None:
        if full:
            raise ApplianceUnavailable("the disk is full")
        kept.append(usage.id)

    nobody: Any = SimpleNamespace(end=lambda request: None)
    log: Any = SimpleNamespace(add=add)
    ending = Completions("tiny", nobody, engine, nobody, log, 64)  # type: ignore[arg-type]

    async def end(request: str) -> None:
        ending._asked[request] = _Asked("tiny", 3)
        timing = SimpleNamespace(tokens=4, ttft_ms=1.0, tpot_ms=1.0)
        engine.on_ended(SimpleNamespace(request=request, finish="stop"), timing)
        (task,) = ending._writing._unfinished
        await ending.close()
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
