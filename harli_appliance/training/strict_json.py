"""One line of JSON, read strictly: what Python's parser lets pass (NaN, duplicate keys) is a fault here.

Whatever the bytes, `parse_line` returns a value or raises `LineFault`: no RecursionError, no ValueError.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_NUMBER_DIGITS = 40
"""Longer numbers are no data of a chat, and turning thousands of digits into an int takes quadratic time."""

MAX_DEPTH = 64
"""A chat example is 3 deep."""


class LineFault(Exception):
    """The line is wrong: a stable code, and a message that says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def parse_line(raw: bytes) -> Any:
    """The value that a line holds.

    Args:
        raw: the line without its end.

    Raises:
        LineFault: not UTF-8, or not strict JSON.
    """
    return _parse(_decode(raw))


def shown(value: object, limit: int = 40) -> str:
    """A value as it stands in the file, safe to print: ASCII only, on one line, short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


def _decode(raw: bytes) -> str:
    if (offset := raw.find(b"\0")) >= 0:
        raise LineFault(
            "nul_byte",
            f"NUL byte at byte {offset} of the line; the file is binary or damaged, write it as UTF-8 text",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineFault(
            "not_utf8",
            f"not UTF-8: 0x{raw[error.start]:02x} at byte {error.start} of the line; save the file as UTF-8",
        ) from None


def _parse(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise LineFault(
                "invalid_json", f"more than one JSON value, at column {error.colno}; write one object a line"
            ) from None
        raise LineFault(
            "invalid_json",
            f"not valid JSON: {error.msg} at column {error.colno}; write one JSON object a line",
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if _deeper_than(value, MAX_DEPTH):
        raise _too_deep()
    return value


def _too_deep() -> LineFault:
    return LineFault(
        "too_deep",
        f"nested more than {MAX_DEPTH} levels deep; an example is an object with a list of messages",
    )


def _deeper_than(value: object, depth: int) -> bool:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(depth):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LineFault(
                "duplicate_key", f"the key {shown(key)} stands twice in one object; keep one of them"
            )
        found[key] = value
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise LineFault(
            "number_too_large", f"a number of {len(digits)} digits; write a smaller one or a string"
        )
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise LineFault("number_too_large", f"the number {digits[:20]} is too large; write a smaller one")
    return value


def _not_a_number(literal: str) -> NoReturn:
    raise LineFault("not_finite", f"{literal} is not JSON; leave the value out or write null or a number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates,
    parse_int=_whole_number,
    parse_float=_fraction,
    parse_constant=_not_a_number,
)
