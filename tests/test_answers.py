"""From tokens to a completion's choices: which log-probabilities go with which text, and who is aborted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from harli_appliance.answers import LEAST_LOGPROB, Answer, sampling_of_choice
from harli_appliance.api.ports import TextDelta
from harli_appliance.engine.streams import TokenStream
from harli_appliance.errors import EngineFault
from harli_appliance.runtime.protocol import FinishReason, NewTokens, Sampling, TokenLogprob
from harli_appliance.runtime.text import TextCodec

EOS = 1


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TextCodec:
    return TextCodec(tiny_model)


class Rig:
    """Streams whose tokens the test brings, and the answer that reads them."""

    def __init__(self, codec: TextCodec, choices: int = 1, stop: tuple[str, ...] = ()) -> None:
        self.aborted: list[str] = []
        self.streams = [TokenStream(f"choice-{i}", self.aborted.append) for i in range(choices)]
        self.answer = Answer(self.streams, codec, stop, prompt_tokens=5)

    def bring(self, choice: int, tokens: list[int], finish: FinishReason | None, cached: int = 0) -> None:
        """One step a token; the logarithms count down, so that each names its token's place."""
        for at, token in enumerate(tokens):
            last = at == len(tokens) - 1
            self.streams[choice].push(
                NewTokens(
                    f"choice-{choice}",
                    (token,),
                    finish if last else None,
                    cached_tokens=cached,
                    logprobs=(TokenLogprob(-float(at), ((token, -float(at)),)),),
                )
            )

    async def deltas(self) -> list[TextDelta]:
        return [delta async for delta in self.answer]


def ids(codec: TextCodec, text: str) -> list[int]:
    return codec.encode_chat([{"role": "assistant", "content": text}], generation_prompt=False)[1:-1]


def joined(deltas: list[TextDelta]) -> tuple[str, bytes, int]:
    text = "".join(delta.text for delta in deltas)
    reported = b"".join(entry.token for delta in deltas for entry in delta.logprobs)
    return text, reported, sum(delta.tokens for delta in deltas)


async def test_bytes_of_the_reported_tokens_are_the_text(codec: TextCodec) -> None:
    rig = Rig(codec)
    tokens = [*ids(codec, "a cät 🦦 sings"), EOS]
    rig.bring(0, tokens, "stop")
    deltas = await rig.deltas()
    text, reported, count = joined(deltas)
    assert (text, reported.decode(), count) == ("a cät 🦦 sings", text, len(tokens))
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.logprob for entry in entries] == [-float(at) for at in range(len(tokens) - 1)]
    assert all(entry.top[0].token == entry.token for entry in entries)
    # Never ahead of its text, nor behind by more than what is no whole character yet.
    for delta in deltas[:-1]:
        assert b"".join(entry.token for entry in delta.logprobs).decode() == delta.text


async def test_a_stop_string_takes_its_tokens_out_of_the_report(codec: TextCodec) -> None:
    rig = Rig(codec, stop=(" sings",))
    rig.bring(0, ids(codec, "a cat sings"), "stop")
    assert joined(await rig.deltas())[:2] == ("a cat", b"a cat")


async def test_an_answer_cut_by_length_reports_every_token(codec: TextCodec) -> None:
    rig = Rig(codec)
    tokens = ids(codec, "🦦")[:-1]  # no whole character
    rig.bring(0, tokens, "length")
    deltas = await rig.deltas()
    text, reported, count = joined(deltas)
    assert (text, reported, count) == ("", "🦦".encode()[: len(reported)], len(tokens))
    assert sum(len(delta.logprobs) for delta in deltas) == len(tokens)
    assert deltas[-1].finish_reason == "length"


async def test_an_impossible_token_has_a_finite_logarithm(codec: TextCodec) -> None:
    rig = Rig(codec)
    rig.streams[0].push(NewTokens("choice-0", (70,), "length", logprobs=(TokenLogprob(float("-inf")),)))
    (delta,) = await rig.deltas()
    assert delta.logprobs[0].logprob == LEAST_LOGPROB


async def test_choices_interleave_as_their_tokens_come(codec: TextCodec) -> None:
    rig = Rig(codec, choices=3)
    deltas = aiter(rig.answer)

    async def brought(choice: int, text: str, finish: FinishReason | None) -> TextDelta:
        rig.bring(choice, ids(codec, text), finish, cached=4 + choice)
        return await asyncio.wait_for(anext(deltas), 5)

    found = [
        await brought(2, " dog", None),
        await brought(0, " cat", None),
        await brought(2, " sings", "length"),
        await brought(1, " otter", "stop"),
        await brought(0, " a", "stop"),
    ]
    assert [(delta.choice, delta.text, delta.finish_reason) for delta in found] == [
        (2, " dog", None),
        (0, " cat", None),
        (2, " sings", "length"),
        (1, " otter", "stop"),
        (0, " a", "stop"),
    ]
    assert await anext(deltas, None) is None
    assert (rig.answer.prompt_tokens, rig.answer.cached_tokens) == (5, 4)


async def test_a_choice_that_fails_takes_the_others_with_it(codec: TextCodec) -> None:
    rig = Rig(codec, choices=2)
    rig.bring(0, ids(codec, "a"), None)
    rig.streams[1].push(NewTokens("choice-1", (), "error", error="kernel exploded"))
    with pytest.raises(EngineFault, match="kernel exploded"):
        await rig.deltas()
    assert rig.aborted == ["choice-0"]


async def test_aborting_an_answer_aborts_all_of_its_choices(codec: TextCodec) -> None:
    rig = Rig(codec, choices=3)
    rig.bring(0, ids(codec, "a"), None)
    deltas = aiter(rig.answer)
    await anext(deltas)
    rig.answer.abort()
    rig.answer.abort()
    assert rig.aborted == ["choice-0", "choice-1", "choice-2"]


def test_choices_have_seeds_of_their_own() -> None:
    first = Sampling(temperature=1.0, seed=2**63 - 2, top_k=5)
    assert [sampling_of_choice(first, choice).seed for choice in range(3)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert sampling_of_choice(first, 1).top_k == 5
    assert sampling_of_choice(Sampling(), 3) == Sampling()


@pytest.mark.parametrize("choices", [1, 2])
async def test_who_reads_an_aborted_answer_comes_to_its_end(codec: TextCodec, choices: int) -> None:
    rig = Rig(codec, choices)
    reading = asyncio.create_task(rig.deltas())
    await asyncio.sleep(0)
    rig.answer.abort()
    for choice in range(choices):
        rig.bring(choice, [EOS], "abort")
    assert await asyncio.wait_for(reading, 5) == []
