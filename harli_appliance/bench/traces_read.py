"""Reads published traces, recognised by the names of their columns:

- Azure LLM inference 2023 and 2024 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; ISO dates, with or without
  fractions and time zone), github.com/Azure/AzurePublicDataset;
- BurstGPT (CSV: Timestamp, Request tokens, Response tokens; seconds), github.com/HPMLL/BurstGPT. Failed requests
  have no response tokens there and count as bad rows;
- Mooncake (JSON lines: timestamp, input_length, output_length, hash_ids; milliseconds, each id a block of 512
  tokens that includes what is before it), github.com/kvcache-ai/Mooncake.

Other columns are ignored. A bad row is an error that names it, or is counted and left out when that is asked for.
Knows files; what can be done with a trace is in `traces`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.errors import UsageError

LONGEST_REQUEST = 100_000_000
"""Tokens; a larger number is a mistake, not a request."""


class BadRow(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True, slots=True)
class _Columns:
    """A CSV format: the names of its columns in lower case, and how its times are written."""

    title: str
    time: str
    prompt: str
    output: str
    seconds: Callable[[str], float]

    def names(self) -> tuple[str, str, str]:
        return (self.time, self.prompt, self.output)


def _iso_seconds(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadRow(f"TIMESTAMP '{text}' is no date and time") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _plain_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise BadRow(f"Timestamp '{text}' is no number of seconds")
    return seconds


_CSV_FORMATS = (
    _Columns("Azure", "timestamp", "contexttokens", "generatedtokens", _iso_seconds),
    _Columns("BurstGPT", "timestamp", "request tokens", "response tokens", _plain_seconds),
)
_KNOWN = (
    "Azure (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT (CSV: Timestamp, Request tokens, "
    "Response tokens), Mooncake (JSON lines: timestamp, input_length, output_length, hash_ids)"
)


def load_trace(path: Path, *, skip_bad: bool = False) -> Trace:
    """Read a trace; its first arrival becomes second 0.

    Args:
        path: a file in one of the formats above; which one is seen from its first line.
        skip_bad: leave bad rows out and count them in `Trace.skipped`.

    Raises:
        UsageError: the file cannot be read, has no known format or no usable row, or a row is bad; the message
            names the row as an editor numbers lines (a CSV file's header is row 1).
    """
    skipped = 0
    found: list[TraceRequest] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row, parsed in _rows(path, file):
                if isinstance(parsed, TraceRequest):
                    found.append(parsed)
                elif skip_bad:
                    skipped += 1
                else:
                    raise UsageError(
                        f"{path}, row {row}: {parsed}; correct it, or leave bad rows out with --skip-bad",
                        param="trace",
                    )
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", param="trace") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: is no text file of a trace: {error}", param="trace") from error
    if not found:
        bad = f" ({skipped} bad ones were left out)" if skipped else ""
        raise UsageError(f"{path}: has no usable rows{bad}", param="trace")
    found.sort(key=lambda request: request.at_s)
    first = found[0].at_s
    requests = tuple(replace(request, at_s=request.at_s - first) for request in found)
    return Trace(path.name, requests, requests[-1].at_s, skipped=skipped)


_Parsed = TraceRequest | BadRow


def _rows(path: Path, file: Any) -> Iterator[tuple[int, _Parsed]]:
    """Row numbers with what is in them; times are as in the file."""
    start = file.readline()
    number = 1
    while start and not start.strip():
        start, number = file.readline(), number + 1
    if not start:
        return
    if start.lstrip().startswith("{"):
        yield number, _attempt(_mooncake, start)
        for following, line in enumerate(file, start=number + 1):
            if line.strip():
                yield following, _attempt(_mooncake, line)
        return
    header = [name.strip().lower() for name in next(csv.reader([start]), [])]
    chosen = next((form for form in _CSV_FORMATS if set(form.names()) <= set(header)), None)
    if chosen is None:
        seen = start.strip()[:80]
        raise UsageError(
            f"{path}: starts with '{seen}', which is no trace known here: {_KNOWN}", param="trace"
        )
    where = [header.index(name) for name in chosen.names()]
    reader = csv.reader(file)
    for cells in reader:
        if cells:
            yield number + reader.line_num, _attempt(_csv_row, (chosen, where, cells, len(header)))


def _attempt(parse: Callable[[Any], TraceRequest], row: Any) -> _Parsed:
    try:
        return parse(row)
    except BadRow as problem:
        return problem


def _csv_row(row: tuple[_Columns, list[int], list[str], int]) -> TraceRequest:
    form, where, cells, columns = row
    if len(cells) != columns:
        raise BadRow(f"has {len(cells)} of {columns} columns")
    time, prompt, output = (cells[place].strip() for place in where)
    return TraceRequest(form.seconds(time), _tokens("prompt", prompt), _tokens("response", output))


def _tokens(what: str, text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise BadRow(f"'{text}' is no number of {what} tokens") from None
    return _length(what, count)


def _length(what: str, count: int) -> int:
    if not 1 <= count <= LONGEST_REQUEST:
        raise BadRow(f"{count} {what} tokens; there must be 1 to {LONGEST_REQUEST:,}")
    return count


def _mooncake(line: str) -> TraceRequest:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is no JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise BadRow("is no JSON object")
    milliseconds = _number(row, "timestamp")
    prompt = _length("prompt", _whole(row, "input_length"))
    output = _length("response", _whole(row, "output_length"))
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise BadRow("hash_ids must be a list of whole numbers")
    return TraceRequest(milliseconds / 1e3, prompt, output, tuple(blocks))


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is {json.dumps(value)}, not a number" if name in row else f"has no {name}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"{name} is {'NaN, not a number' if math.isnan(number) else 'too large'}")
    return number


def _whole(row: Mapping[str, Any], name: str) -> int:
    value = _number(row, name)
    if value != int(value):
        raise BadRow(f"{name} is {value:g}, not a whole number")
    return int(value)
