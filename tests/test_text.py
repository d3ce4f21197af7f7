"""Decoding token by token: whole characters only, and never a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from harli_appliance.errors import UsageError
from harli_appliance.runtime.text import TextCodec


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TextCodec:
    return TextCodec(tiny_model)


def tokens_of(codec: TextCodec, text: str) -> list[int]:
    ids = codec.encode_chat([{"role": "assistant", "content": text}], generation_prompt=False)
    return ids[1:-1]  # without the role and the end of the turn


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_join_to_the_text_and_are_never_broken(codec: TextCodec, text: str) -> None:
    decoder = codec.decoder()
    pieces = [decoder.push([token]) for token in tokens_of(codec, text)]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + decoder.finish() == text


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("four",), "one two three"),
        ("aaab", ("aab",), "a"),
        ("a cat sings", ("zzz", " sings"), "a cat"),
        ("abcabd", ("abd", "xyz"), "abc"),
    ],
)
def test_stop_strings_are_held_back(codec: TextCodec, text: str, stop: tuple[str, ...], wanted: str) -> None:
    decoder = codec.decoder(stop)
    emitted = ""
    for token in tokens_of(codec, text):
        emitted += decoder.push([token])
        assert wanted.startswith(emitted) or emitted == wanted
    assert emitted + decoder.finish() == wanted


def test_what_cannot_fit_is_refused_without_encoding_it(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(text: str) -> int:
        return len(codec.encode_chat([{"role": "user", "content": text}], most_tokens=100))

    # The longest token is "<|assistant|>": the text may well be of no other.
    assert count("<|assistant|>" * 98) == 101
    with pytest.raises(UsageError, match=r"1\d{3} characters .* context of 100 tokens") as refusal:
        count("<|assistant|>" * 110)
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")
    monkeypatch.setattr(type(codec._tokenizer), "encode", lambda *_, **__: pytest.fail("it was encoded"))
    with pytest.raises(UsageError):
        count("word " * 100_000)


def test_characters_that_the_tokenizer_drops_do_not_count(tiny_model: Path) -> None:
    codec = TextCodec(tiny_model)
    codec._tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    assert len(codec.encode_chat([{"role": "user", "content": "a" + " " * 5000}], most_tokens=20)) < 20


def test_a_model_without_a_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("chat_template.jinja",):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="chat template"):
        TextCodec(tmp_path)
