"""Sends planned requests to an OpenAI-compatible server at their times, and measures what a client sees.

Knows the client and the clock. Does not know who serves. The loop is open: a slow answer delays no later
request, so a queue shows up in the numbers instead of hiding them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from harli_appliance.bench.system import Chat
from harli_appliance.bench.workload import PlannedRequest
from harli_appliance.client import StreamedText, StreamEnd
from harli_appliance.errors import HarliError

PERCENTILE_METHOD: Final = "linear"
"""numpy's default: between two samples the value is interpolated."""


@dataclass(frozen=True, slots=True)
class Slo:
    tpot_ms: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Record:
    """What happened to one request. Times are the client's; a failed one has an `error`."""

    index: int
    prompt: str
    sent_at: float
    """Seconds since the epoch."""
    ended_at: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    """(last token - first token) / (tokens - 1); None for an answer of one token."""
    itl_s: tuple[float, ...] = ()
    """Gaps between the chunks of text."""
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    error: str | None = None

    def meets(self, slo: Slo) -> bool:
        if self.error is not None or self.ttft_s is None or self.ttft_s * 1e3 > slo.ttft_ms:
            return False
        return self.tpot_s is None or self.tpot_s * 1e3 <= slo.tpot_ms


async def replay(
    client: Chat,
    model: str,
    requests: Iterable[PlannedRequest],
    *,
    stop: asyncio.Event | None = None,
    on_record: Callable[[Record], None] = lambda _: None,
    timeout_s: float = 120.0,
    answered_by_s: float | None = None,
) -> list[Record]:
    """Send every request at its time and wait for all answers.

    Args:
        client: connected to the server.
        model: the name to ask for.
        requests: in order of time; may be endless when `stop` is given.
        stop: once set, no more are sent; those under way are finished.
        on_record: called as each one ends.
        timeout_s: a request that takes longer has failed.
        answered_by_s: so many seconds after the start, what is not answered has failed.

    Returns:
        One record for each request sent, in the order in which they were sent.
    """
    start = time.perf_counter()
    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        for request in requests:
            if not await _wait_until(start + request.at_s, stop):
                break
            left = timeout_s if answered_by_s is None else start + answered_by_s - time.perf_counter()
            task = group.create_task(ask(client, model, request, timeout_s=min(timeout_s, left)))
            task.add_done_callback(lambda done: None if done.cancelled() else on_record(done.result()))
            tasks.append(task)
    return [task.result() for task in tasks]


async def _wait_until(moment: float, stop: asyncio.Event | None) -> bool:
    """False when `stop` was set before the moment came."""
    delay = max(0.0, moment - time.perf_counter())
    if stop is None:
        await asyncio.sleep(delay)
        return True
    try:
        await asyncio.wait_for(stop.wait(), delay)
    except TimeoutError:
        return True
    return False


async def ask(client: Chat, model: str, request: PlannedRequest, *, timeout_s: float = 120.0) -> Record:
    """One streamed, greedy answer of the planned length. What goes wrong is told in the record."""
    sent_at, start = time.time(), time.perf_counter()
    pieces: list[StreamedText] = []
    end: StreamEnd | None = None
    error: str | None = None
    messages = [{"role": "user", "content": request.prompt}]
    sampling = {"max_tokens": request.answer_tokens, "temperature": 0, "ignore_eos": True}
    try:
        async with asyncio.timeout(timeout_s):
            async for event in client.stream_chat(model, messages, **sampling):
                if isinstance(event, StreamEnd):
                    end = event
                else:
                    pieces.append(event)
    except TimeoutError:
        error = f"no complete answer within {timeout_s:g} s"
    except (HarliError, ValueError) as problem:  # ValueError: the server sent what is no chat chunk
        error = str(problem)
    arrivals = [piece.at for piece in pieces]
    tokens = end.usage.completion_tokens if end else len(pieces)
    # A token may have no text of its own (a special one, a part of a character): the end has a time too.
    first = arrivals[0] if arrivals else (end.at if end else None)
    return Record(
        index=request.index,
        prompt=request.prompt,
        sent_at=sent_at,
        ended_at=sent_at + time.perf_counter() - start,
        ttft_s=first - start if first is not None else None,
        tpot_s=(end.at - first) / (tokens - 1) if end and first is not None and tokens > 1 else None,
        itl_s=tuple(float(gap) for gap in np.diff(arrivals)),
        prompt_tokens=end.usage.prompt_tokens if end else 0,
        tokens=tokens,
        text="".join(piece.text for piece in pieces),
        error=error,
    )


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50 and p99 (`PERCENTILE_METHOD`); None without values."""
    if not values:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(np.asarray(values), [50, 99], method=PERCENTILE_METHOD)
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def summarise(records: Sequence[Record], slo: Slo) -> dict[str, Any]:
    """Numbers of a replay, ready for JSON.

    `attainment` is the share of all requests, failed ones included, whose TPOT and TTFT met the SLO.
    `output_tokens_per_s` is over the time from the first request to the last answer.
    """
    good = [record for record in records if record.error is None]
    span = max((r.ended_at for r in records), default=0.0) - min((r.sent_at for r in records), default=0.0)
    tokens = sum(record.tokens for record in good)
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "tpot_ms": percentiles([r.tpot_s * 1e3 for r in good if r.tpot_s is not None]),
        "ttft_ms": percentiles([r.ttft_s * 1e3 for r in good if r.ttft_s is not None]),
        "itl_ms": percentiles([gap * 1e3 for r in good for gap in r.itl_s]),
        "attainment": sum(r.meets(slo) for r in records) / len(records) if records else None,
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / span, 3) if span > 0 else None,
        "percentile_method": PERCENTILE_METHOD,
    }


def compare_answers(first: Sequence[Record], second: Sequence[Record]) -> tuple[int, int]:
    """How many answers of `second` can be compared with one to the same prompt in `first`, and how many of
    those differ. Greedy decoding makes the shorter of two answers the beginning of the longer one."""
    answers = {record.prompt: record for record in first if record.error is None}
    compared = differing = 0
    for record in second:
        other = answers.get(record.prompt)
        if other is None or record.error is not None:
            continue
        compared += 1
        short, long = sorted((record.text, other.text), key=len)
        differing += not (long == short if record.tokens == other.tokens else long.startswith(short))
    return compared, differing
