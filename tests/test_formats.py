"""Files of preferences and of plain texts: what is good, what is refused and how, and what is learned of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harli_appliance.runtime.text import TextCodec
from harli_appliance.training.dataset import check_dataset, read_examples
from harli_appliance.training.examples import Example, Message, PreferenceExample, TextExample
from harli_appliance.training.packing import EncodedExample, EncodedPair, encode
from harli_appliance.training.turns import TokenCounter

USER = {"role": "user", "content": "Who are you?"}
GOOD: dict[str, Any] = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [{"role": "assistant", "content": "Harli."}],
    "non_preferred_output": [{"role": "assistant", "content": "A river."}],
}
TEXT = {"text": "Otters swim."}


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def codes(path: Path) -> list[tuple[int, str]]:
    return [(finding.line, finding.code) for finding in check_dataset(path).errors]


def test_a_file_of_preferences_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", GOOD, {**GOOD, "input": {"messages": [{"role": "user", "content": "b"}]}}
    )
    report = check_dataset(path)
    assert (report.ok, report.examples, report.format, report.warnings) == (True, 2, "preference", ())
    first, _ = read_examples(path)
    prompt = Message("user", "Who are you?", 0)
    assert first == PreferenceExample(
        Example((prompt, Message("assistant", "Harli.", 1))),
        Example((prompt, Message("assistant", "A river.", 1))),
    )


def test_earlier_turns_of_a_prompt_are_never_learned(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "Wait.", "weight": 1}, USER]
    (found,) = read_examples(written(tmp_path / "a.jsonl", {**GOOD, "input": {"messages": turns}}))
    assert isinstance(found, PreferenceExample)
    assert [message.weight for message in found.preferred.messages] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"input": None}, "input_wrong"),
        ({"input": {"messages": []}}, "input_wrong"),
        ({"input": {"messages": [USER], "tools": [{"type": "function"}]}}, "unsupported"),
        ({"preferred_output": None}, "output_wrong"),
        ({"non_preferred_output": []}, "output_wrong"),
        ({"preferred_output": [USER]}, "output_wrong"),
        ({"preferred_output": [{"role": "assistant", "content": " "}]}, "content_empty"),
        ({"preferred_output": GOOD["non_preferred_output"]}, "same_outputs"),
        ({"input": {"messages": ["hi"]}}, "message_not_an_object"),
    ],
)
def test_a_wrong_preference_is_refused_with_its_line(tmp_path: Path, changes: Any, code: str) -> None:
    assert codes(written(tmp_path / "a.jsonl", GOOD, {**GOOD, **changes}, GOOD)) == [(2, code)]


def test_a_file_of_texts_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", TEXT, {"text": "b"})
    report = check_dataset(path)
    assert (report.ok, report.examples, report.format) == (True, 2, "text")
    assert list(read_examples(path)) == [TextExample("Otters swim."), TextExample("b")]
    assert report.as_json()["format"] == "text"


@pytest.mark.parametrize(
    ("text", "code"),
    [(None, "content_null"), ("", "content_empty"), (3, "content_not_text"), ("\0", "nul_character")],
)
def test_a_wrong_text_is_refused_with_its_line(tmp_path: Path, text: object, code: str) -> None:
    assert codes(written(tmp_path / "a.jsonl", TEXT, {"text": text})) == [(2, code)]


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    chat = {"messages": [USER, {"role": "assistant", "content": "Harli."}]}
    assert codes(written(tmp_path / "a.jsonl", chat, TEXT, chat, GOOD)) == [
        (2, "mixed_formats"),
        (4, "mixed_formats"),
    ]


def test_the_longer_side_of_a_preference_must_fit(tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    codec = TextCodec(tiny_model)
    sides = [[USER, *GOOD[name]] for name in ("preferred_output", "non_preferred_output")]
    longest = max(len(codec.encode_chat(side, generation_prompt=False)) for side in sides)
    count = TokenCounter(codec)
    assert check_dataset(path, count_tokens=count, context_length=longest).ok
    assert not check_dataset(path, count_tokens=count, context_length=longest - 1).ok


def test_what_is_learned_of_each_format(tiny_model: Path, tmp_path: Path) -> None:
    codec = TextCodec(tiny_model)
    (text,) = read_examples(written(tmp_path / "a.jsonl", TEXT))
    encoded = encode(text, codec)
    assert isinstance(encoded, EncodedExample)
    assert encoded.tokens == tuple(codec.encode_text("Otters swim."))
    assert encoded.learned_tokens == len(encoded.tokens) - 1
    assert TokenCounter(codec)(text) == len(encoded.tokens)
    (pair,) = read_examples(written(tmp_path / "b.jsonl", GOOD))
    both = encode(pair, codec)
    assert isinstance(both, EncodedPair)
    prompt = codec.encode_chat([USER])
    for side in both.parts:
        assert list(side.tokens[: len(prompt)]) == prompt
        assert side.learn == (False,) * len(prompt) + (True,) * (len(side.tokens) - len(prompt))
