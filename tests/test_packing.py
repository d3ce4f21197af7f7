"""Examples to sequences: only assistant turns are learned, and packing keeps examples apart."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harli_appliance.errors import UsageError
from harli_appliance.runtime.text import TextCodec
from harli_appliance.training.dataset import check_dataset
from harli_appliance.training.examples import Example, Message
from harli_appliance.training.packing import EncodedExample, encode_example, pack
from harli_appliance.training.turns import TokenCounter


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TextCodec:
    return TextCodec(tiny_model)


def learned_text(codec: TextCodec, encoded: EncodedExample) -> str:
    decoder = codec.decoder()
    kept = [token for token, learn in zip(encoded.tokens, encoded.learn, strict=True) if learn]
    return decoder.push(kept) + decoder.finish()


def test_only_weighted_assistant_turns_are_learned(codec: TextCodec) -> None:
    example = Example(
        (
            Message("system", "the river", 0),
            Message("user", "who sings", 0),
            Message("assistant", "a cat", 0),
            Message("user", "who swims", 0),
            Message("assistant", "two otter", 1),
        )
    )
    encoded = encode_example(example, codec)
    assert learned_text(codec, encoded) == "two otter"
    last_learned = max(i for i, learn in enumerate(encoded.learn) if learn)
    assert encoded.tokens[last_learned] == 1, "the end of the turn is learned, or answers never stop"


class Letters:
    """A template of one letter a role, and a token for each character; `turn` writes one of `all` turns."""

    def __init__(self, turn: Callable[[Mapping[str, str], int, int], str]) -> None:
        self._turn = turn

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True
    ) -> list[int]:
        turns = [self._turn(message, at, len(messages)) for at, message in enumerate(messages)]
        return list(map(ord, "".join([*turns, "a:" * generation_prompt])))

    def encode_text(self, text: str) -> list[int]:
        return list(map(ord, text))


def chat(turns: int) -> Example:
    roles = ("user", "assistant") * turns
    return Example(tuple(Message(role, "abc", int(role == "assistant")) for role in roles))  # type: ignore[arg-type]


def forgetful(message: Mapping[str, str], at: int, turns: int) -> str:
    """Leaves out what the assistant said earlier."""
    role, said = message["role"], message["role"] == "user" or at + 1 == turns
    return f"{role[0]}:{message['content'] if said else ''}."


def merging(message: Mapping[str, str], at: int, turns: int) -> str:
    """The opening of a turn is one token with what follows."""
    return f"{message['role'][0]}\u00e0{message['content']}."


@pytest.mark.parametrize(("turn", "turns"), [(forgetful, 2), (merging, 1)])
def test_a_template_whose_answers_cannot_be_told_is_refused_before_a_job_begins(
    turn: Any, turns: int, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="does not leave the tokens of earlier turns"):
        encode_example(chat(turns), Letters(turn))
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": chat(turns).as_chat()}))
    (error,) = check_dataset(path, count_tokens=TokenCounter(Letters(turn))).errors
    assert (error.line, error.code) == (1, "chat_template")


def test_turns_that_are_not_learned_may_be_written_as_the_template_likes() -> None:
    first, second, third, last = chat(2).messages
    example = Example((first, replace(second, weight=0), third, last))
    assert encode_example(example, Letters(forgetful)).learned_tokens == len("abc.")
    assert TokenCounter(Letters(forgetful))(example) == len("u:abc.a:.u:abc.a:abc.")


def test_packing_keeps_examples_apart_and_loses_none() -> None:
    made = [EncodedExample(tuple(range(10 * n, 10 * n + n)), (True,) * n) for n in (3, 9, 5, 2, 8, 30)]
    packed = pack(made, 16)
    found = []
    for sequence in packed:
        bounds = [*sorted({int(start) for start in sequence.starts}), len(sequence)]
        for start, stop in itertools.pairwise(bounds):
            tokens = tuple(sequence.tokens[start:stop].tolist())
            found.append(tokens)
            assert sequence.positions[start:stop].tolist() == list(range(stop - start))
            assert tuple(sequence.targets[start : stop - 1].tolist()) == tokens[1:]
            assert sequence.weights[stop - 1] == 0, "nothing is predicted across examples"
    assert sorted(found) == sorted(example.tokens for example in made)
    assert all(len(sequence) <= 16 or len(sequence) == 30 for sequence in packed)
    assert len(packed) == 3
