"""Examples to sequences: only assistant turns are learned, and packing keeps examples apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from harli_appliance.errors import UsageError
from harli_appliance.runtime.text import TextCodec
from harli_appliance.training.examples import Example, Message
from harli_appliance.training.packing import EncodedExample, encode_example, pack


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


def test_a_template_that_rewrites_history_is_refused() -> None:
    class Forgetful:
        def encode_chat(self, messages: object, *, generation_prompt: bool = True) -> list[int]:
            return [len(list(messages)), 7]  # type: ignore[call-overload]

    with pytest.raises(UsageError, match="template"):
        encode_example(Example((Message("user", "a", 0), Message("assistant", "b", 1))), Forgetful())


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
