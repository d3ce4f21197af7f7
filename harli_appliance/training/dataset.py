"""Training files: OpenAI's chat or preference format or plain texts, one JSON object a line, UTF-8.

`check_dataset` reads a file of any content in constant memory and reports every fault with its line; it
never raises for what is in the file. `read_examples` gives a checked file to the trainer. Knows no
tokenizer: whoever has one passes `count_tokens`.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from harli_appliance.errors import DatasetError
from harli_appliance.schema import DataFormat
from harli_appliance.training.examples import AnyExample, Verdict
from harli_appliance.training.findings import Finding, Findings, Report
from harli_appliance.training.preferences import judge
from harli_appliance.training.strict_json import LineFault, parse_line

MIB = 1024 * 1024
MAX_LINE_BYTES = 4 * MIB
MAX_FILE_BYTES = 512 * MIB
MAX_FINDINGS = 100
REMEMBERED_EXAMPLES = 100_000
"""Duplicates are looked for among so many examples: about 10 MiB of digests."""

CountTokens = Callable[[AnyExample], int]
"""Tokens of an example as the served model reads it; see `turns.TokenCounter`."""

_CHUNK = 64 * 1024
_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip file; unpack it first (gunzip)"),
    (b"PK\x03\x04", "a zip file (or a spreadsheet); unpack it, or export it as JSONL"),
    (b"PK\x05\x06", "an empty zip file; export the data as JSONL"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first (unzstd)"),
    (b"BZh", "a bzip2 file; unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "an xz file; unpack it first (unxz)"),
    (b"PAR1", "a Parquet file; export it as JSONL"),
    (b"%PDF-", "a PDF file; write one JSON object a line"),
    (b"SQLite format 3\x00", "an SQLite database; export the data as JSONL"),
)
_UTF16_OR_32_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    raw: bytes
    too_long: bool


def check_dataset(
    path: Path,
    *,
    count_tokens: CountTokens | None = None,
    context_length: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_findings: int = MAX_FINDINGS,
) -> Report:
    """Check a training file.

    Args:
        path: the file; one that cannot be read is reported like a bad one.
        count_tokens: tells how long an example is; None leaves that out.
        context_length: tokens that an example may have at most.
        max_findings: errors (and as many warnings) that are told one by one.
    """
    check = _Check(count_tokens, context_length, max_findings)
    try:
        check.file(path, max_file_bytes, max_line_bytes)
    except OSError as error:
        check.errors.add(1, "unreadable", f"{path} cannot be read: {error.strerror or error}")
    return check.report()


def read_examples(path: Path) -> Iterator[AnyExample]:
    """The examples of a file that `check_dataset` found good, in order.

    Raises:
        DatasetError: the file is not good after all.
    """
    with path.open("rb") as file:
        for line in _lines(file, MAX_LINE_BYTES):
            if not line.raw.strip():
                continue
            try:
                verdict = judge(parse_line(line.raw))
            except LineFault as fault:
                raise DatasetError(f"{path.name}, line {line.number}: {fault.message}") from None
            if verdict.example is None:
                raise DatasetError(f"{path.name}, line {line.number}: {verdict.faults[0].message}")
            yield verdict.example


class _Check:
    """The state of one check, fed line by line."""

    def __init__(
        self, count_tokens: CountTokens | None, context_length: int | None, max_findings: int
    ) -> None:
        self.errors = Findings("errors", max_findings)
        self._warnings = Findings("warnings", max_findings)
        self._count_tokens = count_tokens
        self._context_length = context_length
        self._examples = 0
        self._judged = 0
        self._too_long = 0
        self._first_too_long = 0
        self._seen: dict[bytes, int] = {}
        self._format: DataFormat | None = None

    def report(self) -> Report:
        summaries = []
        if self._too_long:
            summaries.append(
                Finding(
                    self._first_too_long,
                    "examples_too_long",
                    f"{self._too_long} of {self._judged} examples are longer than the context of "
                    f"{self._context_length} tokens; shorten or split them",
                )
            )
        return Report(
            self._examples, self.errors.closed(summaries), self._warnings.closed(), self._format or "chat"
        )

    def file(self, path: Path, max_file_bytes: int, max_line_bytes: int) -> None:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            self.errors.add(1, "not_a_file", f"{path} is not a regular file; give a .jsonl file")
            return
        if status.st_size > max_file_bytes:
            self.errors.add(
                1,
                "file_too_large",
                f"the file has {status.st_size / MIB:.1f} MiB; split it, "
                f"the limit is {max_file_bytes / MIB:g} MiB",
            )
            return
        with path.open("rb") as file:
            head = file.read(_CHUNK)
            file.seek(0)
            if (wrong := _other_file(head)) is not None:
                self.errors.add(1, *wrong)
                return
            if head.startswith(_UTF8_BOM):
                self._warnings.add(
                    1, "byte_order_mark", "the file begins with a UTF-8 byte order mark; it is skipped"
                )
            for line in _lines(file, max_line_bytes):
                if not self._line(line, max_line_bytes):
                    return
        if not self._judged and not self.errors.closed():
            self.errors.add(1, "empty_file", "the file holds no example; write one JSON object a line")

    def _line(self, line: _Line, max_line_bytes: int) -> bool:
        """Judge a line; False when the rest of the file is not worth reading."""
        if line.too_long:
            self.errors.add(
                line.number,
                "line_too_long",
                f"the line is longer than the limit of {max_line_bytes / MIB:g} MiB; split the example",
            )
            return True
        text = line.raw.strip()
        if not text:
            self._warnings.add(line.number, "blank_line", "the line is blank; it is skipped")
            return True
        first = self._judged == 0
        self._judged += 1
        try:
            verdict = judge(parse_line(line.raw))
        except LineFault as fault:
            if first and (whole := _whole_file_fault(text)) is not None:
                self.errors.add(line.number, *whole)
                return False
            self.errors.add(line.number, fault.code, fault.message)
            return True
        for warning in verdict.warnings:
            self._warnings.add(line.number, warning.code, warning.message)
        for wrong in verdict.faults:
            self.errors.add(line.number, wrong.code, wrong.message)
        self._good(line.number, verdict)
        return True

    def _good(self, number: int, verdict: Verdict) -> None:
        if verdict.example is None or not self._fits(number, verdict.example):
            return
        found = verdict.example.format
        self._format = self._format or found
        if found != self._format:
            self.errors.add(
                number,
                "mixed_formats",
                f"a line of the {found} format among {self._format} lines; put each format in a file of its own",
            )
            return
        self._examples += 1
        digest = hashlib.blake2b(repr(verdict.example).encode(), digest_size=12).digest()
        if (earlier := self._seen.get(digest)) is not None:
            self._warnings.add(
                number, "duplicate_example", f"the same example as in line {earlier}; leave one out"
            )
        elif len(self._seen) < REMEMBERED_EXAMPLES:
            self._seen[digest] = number

    def _fits(self, number: int, example: AnyExample) -> bool:
        if self._count_tokens is None:
            return True
        try:
            tokens = self._count_tokens(example)
        except Exception as error:  # a chat template may raise anything; here it is the data's fault
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.errors.add(
                number, "chat_template", f"the model's chat template refuses the example: {reason}"
            )
            return False
        if self._context_length is None or tokens <= self._context_length:
            return True
        self._too_long += 1
        self._first_too_long = self._first_too_long or number
        self.errors.add(
            number,
            "example_too_long",
            f"the example has {tokens} tokens and the context {self._context_length}; shorten or split it",
        )
        return False


def _lines(file: BinaryIO, max_line_bytes: int) -> Iterator[_Line]:
    """Lines without their ends (LF or CRLF) and the file's byte order mark; long ones come empty."""
    number = 0
    while raw := file.readline(max_line_bytes + 2):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_UTF8_BOM)
        ended = raw.endswith(b"\n")
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        too_long = len(raw) > max_line_bytes
        while too_long and not ended:
            rest = file.readline(_CHUNK)
            ended = not rest or rest.endswith(b"\n")
        yield _Line(number, b"" if too_long else raw, too_long)


def _other_file(head: bytes) -> tuple[str, str] | None:
    """What the file is when it is no text in UTF-8 at all: a code and a message."""
    for magic, name in _OTHER_FILES:
        if head.startswith(magic):
            return "not_jsonl", f"this is {name}"
    # ASCII in UTF-16 or UTF-32 has a NUL in every other byte, whichever way round.
    looks_wide = (
        len(head) >= 4 and (head[1:4:2] == b"\0\0" or head[0:4:2] == b"\0\0") and head[:4] != b"\0\0\0\0"
    )
    if head.startswith(_UTF16_OR_32_BOMS) or looks_wide:
        return "not_utf8", "the file is UTF-16 or UTF-32 (at byte 0); save it as UTF-8"
    return None


def _whole_file_fault(first_line: bytes) -> tuple[str, str] | None:
    """What the first line, which does not parse, tells of the whole file: a code and a message."""
    if first_line.startswith(b"["):
        return "json_array", "this is a JSON array; write one object a line, without the brackets"
    if first_line == b"{":
        return (
            "object_over_lines",
            "an object is spread over several lines; write each one on a line of its own",
        )
    return None
