"""From a call to running requests: what is refused before anything is begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from harli_appliance.api.ports import ChatCall
from harli_appliance.completions import Completions
from harli_appliance.engine.streams import TokenStream
from harli_appliance.errors import UsageError
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
