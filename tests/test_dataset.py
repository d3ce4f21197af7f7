"""Training files: every fault is found, told with its line, and nothing in a file makes the check raise."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harli_appliance.errors import DatasetError
from harli_appliance.training.dataset import MAX_FINDINGS, check_dataset, read_examples
from harli_appliance.training.examples import AnyExample, Example, Message

USER = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "Harli."}
GOOD = json.dumps({"messages": [USER, ANSWER]})


def line(*messages: object, **keys: object) -> str:
    return json.dumps({"messages": list(messages), **keys})


@pytest.fixture
def check(tmp_path: Path):
    def check(content: str | bytes, **options):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return check_dataset(path, **options)

    return check


def found(report) -> list[tuple[int, str]]:
    return [(error.line, error.code) for error in report.errors]


def warned(report) -> list[tuple[int, str]]:
    return [(warning.line, warning.code) for warning in report.warnings]


# -- what is good ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        GOOD + "\n",
        GOOD,
        GOOD + "\r\n",
        line({"role": "system", "content": "Be brief."}, USER, ANSWER) + "\n",
        line(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
        line({"role": "user", "content": "naïve 😀 \u2028 \x85"}, ANSWER),
        GOOD.replace("Who", "\\ud83d\\ude00"),
    ],
)
def test_good_files_pass_without_a_word(check, content):
    report = check(content)
    assert report.ok
    assert report.as_json() == {"ok": True, "format": "chat", "examples": 1, "errors": [], "warnings": []}


def test_read_examples_gives_roles_texts_and_weights(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    rows = [
        line({"role": "system", "content": "S"}, USER, {**ANSWER, "weight": 0}, USER, ANSWER),
        "",
        line(USER, {**ANSWER, "weight": 1.0}),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert check_dataset(path).ok
    user, answer = Message("user", "Who are you?", 0), Message("assistant", "Harli.", 1)
    assert list(read_examples(path)) == [
        Example((Message("system", "S", 0), user, Message("assistant", "Harli.", 0), user, answer)),
        Example((user, answer)),
    ]


def test_read_examples_refuses_what_the_check_refuses(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    for second in ("{", line(USER)):
        path.write_text(f"{GOOD}\n{second}\n")
        examples = read_examples(path)
        next(examples)
        with pytest.raises(DatasetError, match=r"data\.jsonl, line 2: "):
            next(examples)


# -- one line ----------------------------------------------------------------------------------------------

# The code of a fault, and lines that have it.
FAULTS: dict[str, list[str | bytes]] = {
    "invalid_json": ["{not json}", GOOD[:-1], GOOD + GOOD, '{"a": 1}\r{"b": 2}', "role,content", '"half'],
    "not_an_object": ["42", "null", "true", '"text"'],
    "json_array": ["[]", f"[{GOOD}]", "[1, 2]"],
    "messages_missing": ["{}", '{"prompt": "a", "completion": "b"}', '{"conversations": []}'],
    "messages_not_a_list": ['{"messages": null}', '{"messages": "hi"}', '{"messages": {"role": "user"}}'],
    "messages_empty": ['{"messages": []}'],
    "message_not_an_object": [line(USER, "Harli."), line(USER, None), line([USER], ANSWER)],
    "role_missing": [line({"content": "hi"}, ANSWER)],
    "role_unknown": [
        line({"role": role, "content": "hi"}, ANSWER)
        for role in ("tool", "developer", "human", "User", "", None, 3, ["user"], {"user": 1}, "\ud800")
    ],
    "content_missing": [line({"role": "user"}, ANSWER)],
    "content_null": [line({"role": "user", "content": None}, ANSWER)],
    "content_empty": [line({"role": "user", "content": text}, ANSWER) for text in ("", " \n\t")],
    "content_not_text": [
        line({"role": "user", "content": value}, ANSWER) for value in (3, True, [], {}, ["a"])
    ],
    "no_assistant_turn": [line(USER)],
    "last_turn_not_assistant": [line(USER, ANSWER, USER)],
    "system_not_first": [
        line(USER, {"role": "system", "content": "S"}, ANSWER),
        line({"role": "system", "content": "S"}, {"role": "system", "content": "S"}, USER, ANSWER),
    ],
    "unsupported": [
        line(USER, ANSWER, tools=[]),
        line(USER, ANSWER, functions=[]),
        line(USER, {**ANSWER, "tool_calls": []}),
        line(USER, {**ANSWER, "function_call": {}}),
    ],
    "weight_wrong": [line(USER, {**ANSWER, "weight": value}) for value in (2, -1, 0.5, True, "1", None, [])],
    "weight_on_other_turn": [line({**USER, "weight": 1}, ANSWER)],
    "nothing_to_learn": [line(USER, {**ANSWER, "weight": 0})],
    "not_utf8": [GOOD.encode() + b"\xff", GOOD.encode("latin-1").replace(b"W", b"\xe9"), b"\xed\xa0\x80"],
    "nul_byte": [GOOD.encode().replace(b"W", b"\0")],
    "nul_character": [GOOD.replace("W", "\\u0000")],
    "not_finite": [GOOD[:-1] + f', "x": {word}}}' for word in ("NaN", "Infinity", "-Infinity")],
    "duplicate_key": [
        '{"messages": [], ' + GOOD[1:],
        GOOD.replace('"role": "user"', '"role": "user", "role": "user"'),
    ],
    "lone_surrogate": [GOOD.replace("W", "\\ud800"), GOOD.replace("W", "\\udc00\\ud800")],
    "number_too_large": [
        GOOD[:-1] + f', "x": {number}}}' for number in ("9" * 5000, "1e999", "-" + "1" * 41)
    ],
    "too_deep": ["[" * 100_000, '{"a":' * 100_000, GOOD[:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}"],
}


CASES = [
    pytest.param(code, wrong if isinstance(wrong, bytes) else wrong.encode(), id=f"{code}-{number}")
    for code, lines in FAULTS.items()
    for number, wrong in enumerate(lines)
]


@pytest.mark.parametrize(("code", "wrong"), CASES)
def test_each_fault_is_found_on_its_line_between_good_ones(check, code, wrong):
    report = check(b"\n".join([GOOD.encode(), wrong, line(USER, {**ANSWER, "content": "other"}).encode()]))
    assert found(report) == [(2, code)]
    assert report.examples == 2
    message = report.errors[0].message
    assert ";" in message or ":" in message  # what is wrong, then what to do
    assert message.isprintable()
    assert len(message) < 220
    json.dumps(report.as_json()).encode()


@pytest.mark.parametrize(("code", "wrong"), CASES)
def test_a_file_of_one_bad_line_holds_no_example(check, code, wrong):
    report = check(wrong)
    assert code in [error.code for error in report.errors] or code == "too_deep"  # "[[[" looks like an array
    assert report.examples == 0


def test_all_faults_of_a_line_are_told(check):
    report = check(line({"role": "usr", "content": ""}, {"role": "assistant"}))
    assert found(report) == [(1, "role_unknown"), (1, "content_empty"), (1, "content_missing")]
    assert "message 2" in report.errors[2].message


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ('{"prompt": "a", "completion": "b"}', "prompt/completion format"),
        ('{"conversations": []}', "ShareGPT format"),
        (line({"role": "developer", "content": "x"}, ANSWER), "write 'system'"),
        (GOOD + GOOD, "one object a line"),
        (GOOD.encode() + b"\xff", f"0xff at byte {len(GOOD)}"),
    ],
)
def test_messages_say_what_to_do(check, wrong, hint):
    assert hint in check(wrong).errors[0].message


def test_what_is_harmless_is_only_warned_of(check):
    rows = [
        "\ufeff" + GOOD,
        "",
        "  ",
        GOOD,
        line({**USER, "name": "Ada"}, ANSWER, id=7),
        line(ANSWER),
    ]
    report = check("\n".join(rows))
    assert report.ok
    assert report.examples == 4
    assert warned(report) == [
        (1, "byte_order_mark"),
        (2, "blank_line"),
        (3, "blank_line"),
        (4, "duplicate_example"),
        (5, "unknown_key"),
        (5, "unknown_key"),
        (5, "duplicate_example"),
        (6, "no_user_turn"),
    ]
    assert "line 1" in report.warnings[3].message


# -- the whole file ----------------------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", GOOD)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "code", "hint"),
    [
        (b"", "empty_file", "no example"),
        (b"\n\n  \n", "empty_file", "no example"),
        (b"\xef\xbb\xbf", "empty_file", "no example"),
        (gzip.compress(GOOD.encode()), "not_jsonl", "gunzip"),
        (zipped(), "not_jsonl", "zip"),
        (GOOD.encode("utf-16"), "not_utf8", "UTF-16"),
        (GOOD.encode("utf-16-le"), "not_utf8", "UTF-16"),
        (GOOD.encode("utf-16-be"), "not_utf8", "UTF-16"),
        (GOOD.encode("utf-32"), "not_utf8", "UTF-32"),
        (json.dumps([json.loads(GOOD)] * 3, indent=2).encode(), "json_array", "one object a line"),
        (json.dumps([json.loads(GOOD)] * 3).encode(), "json_array", "one object a line"),
        (f"[{GOOD},\n{GOOD}]".encode(), "json_array", "one object a line"),
        (json.dumps(json.loads(GOOD), indent=2).encode(), "object_over_lines", "line of its own"),
    ],
)
def test_a_file_of_another_kind_is_told_once(check, content, code, hint):
    report = check(content)
    assert [error.code for error in report.errors] == [code]
    assert hint in report.errors[0].message


def test_what_cannot_be_read_is_reported_not_raised(tmp_path: Path):
    assert found(check_dataset(tmp_path / "none.jsonl")) == [(1, "unreadable")]
    assert found(check_dataset(tmp_path)) == [(1, "not_a_file")]
    assert found(check_dataset(Path("/dev/zero"))) == [(1, "not_a_file")]


def test_a_file_over_the_limit_is_refused_by_its_size(check):
    report = check(GOOD * 100, max_file_bytes=1000)
    assert found(report) == [(1, "file_too_large")]


def test_a_long_line_is_told_with_the_limit_and_the_next_line_is_read(check):
    limit = 1024 * 1024
    just_fits = line(USER, {**ANSWER, "content": "x" * (limit - len(line(USER, {**ANSWER, "content": ""})))})
    assert len(just_fits) == limit
    report = check("\n".join([just_fits, just_fits + " ", GOOD]), max_line_bytes=limit)
    assert found(report) == [(2, "line_too_long")]
    assert "limit of 1 MiB" in report.errors[0].message
    assert report.examples == 2
    assert check(just_fits + "\r\n", max_line_bytes=limit).ok


def test_a_line_without_end_is_never_held_in_memory(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"messages": "')
        file.truncate(64 * 1024 * 1024)  # a hole: no disk, no time
    tracemalloc.start()
    try:
        report = check_dataset(path, max_line_bytes=1024 * 1024)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found(report) == [(1, "line_too_long")]
    assert peak < 8 * 1024 * 1024


def test_a_long_list_of_errors_ends_with_how_many_more(check):
    report = check("\n".join(["{}"] * (MAX_FINDINGS + 7)))
    assert len(report.errors) == MAX_FINDINGS + 1
    assert report.errors[-1].code == "more_errors"
    assert report.errors[-1].line == MAX_FINDINGS + 1
    assert "and 7 more errors" in report.errors[-1].message


# -- the context -------------------------------------------------------------------------------------------


def words(example: AnyExample) -> int:
    assert isinstance(example, Example)
    return sum(len(message.content.split()) for message in example.messages)


def test_examples_longer_than_the_context_are_counted_and_each_told(check):
    rows = [line(USER, {**ANSWER, "content": "word " * number}) for number in (2, 5, 6, 9)]
    report = check("\n".join(rows), count_tokens=words, context_length=8)
    assert found(report) == [(3, "example_too_long"), (4, "example_too_long"), (3, "examples_too_long")]
    assert "12 tokens" in report.errors[1].message
    assert "2 of 4 examples are longer than the context of 8 tokens" in report.errors[2].message
    assert report.examples == 2


def test_how_many_are_too_long_is_told_even_beyond_the_cap(check):
    rows = [line(USER, {**ANSWER, "content": "word " * (9 + number)}) for number in range(5)]
    report = check("\n".join(rows), count_tokens=words, context_length=8, max_findings=2)
    assert [error.code for error in report.errors] == ["example_too_long"] * 2 + [
        "examples_too_long",
        "more_errors",
    ]
    assert "5 of 5" in report.errors[2].message


def test_a_chat_template_that_refuses_is_the_lines_fault(check):
    def refuse(example: AnyExample) -> int:
        raise RuntimeError("roles must\nalternate")

    report = check(GOOD, count_tokens=refuse, context_length=8)
    assert found(report) == [(1, "chat_template")]
    assert "roles must alternate" in report.errors[0].message


# -- anything at all ---------------------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "messages", "x"]), inner)
    ),
    max_leaves=10,
)
ANY_MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system"]) | ANY_JSON,
        "content": ANY_JSON,
        "weight": ANY_JSON,
    },
)
ANY_LINE = (
    st.binary(max_size=60)
    | ANY_JSON.map(lambda value: json.dumps(value).encode())
    | st.lists(ANY_MESSAGE, max_size=3).map(lambda value: json.dumps({"messages": value}).encode())
    | st.just(GOOD.encode())
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(ANY_LINE, max_size=5), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_no_file_makes_the_check_raise_and_a_good_file_can_be_read(tmp_path: Path, rows, end):
    path = tmp_path / "any.jsonl"
    path.write_bytes(end.join(rows))
    report = check_dataset(path, count_tokens=words, context_length=8)
    json.dumps(report.as_json(), allow_nan=False).encode()
    if report.ok:
        assert len(list(read_examples(path))) == report.examples > 0


def test_a_deep_caller_changes_nothing(check):
    def deeper(levels: int):
        return check("[" * 500) if levels == 0 else deeper(levels - 1)

    assert found(deeper(sys.getrecursionlimit() // 2)) in ([(1, "json_array")], [(1, "too_deep")])


def test_checking_needs_neither_torch_nor_transformers():
    code = (
        "import sys, harli_appliance.training.dataset; "
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
