"""Traces of requests: when each came and how long it was. Windows, time, rates and lengths can be changed.

Knows no file format (`traces_read`), no text and no server. Everything random has a seed, so that the same
arguments give the same trace, here and in the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harli_appliance.errors import UsageError

MOONCAKE_BLOCK_TOKENS = 512
JITTER_S = 1.0
"""How far from its original an added copy of a request may arrive; see `Trace.with_rate_factor`."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at_s: seconds after the start of the trace.
        prompt_tokens: at least 1.
        output_tokens: at least 1.
        prefix: ids of the prompt's blocks of `Trace.block_tokens` tokens, in order, the last one perhaps partly
            filled. Requests whose first ids are equal share that much of their prompts. Empty: nothing is shared.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time.

    Attributes:
        name: of the file, or of what made it.
        requests: `at_s` ascends and lies in [0, duration_s].
        duration_s: what the rate is taken over; a quiet end belongs to the trace too.
        block_tokens: length of a block of `TraceRequest.prefix`.
        skipped: bad rows that were left out.
    """

    name: str
    requests: Sequence[TraceRequest]
    duration_s: float
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def rate_per_s(self) -> float:
        """Mean requests per second; 0 for a trace without duration."""
        return len(self.requests) / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def mean_prompt_tokens(self) -> float:
        return sum(r.prompt_tokens for r in self.requests) / max(1, len(self.requests))

    @property
    def mean_output_tokens(self) -> float:
        return sum(r.output_tokens for r in self.requests) / max(1, len(self.requests))

    def count_dispersion(self, window_s: float) -> float:
        """Coefficient of variation of the number of arrivals in windows of `window_s`: how bursty it is at
        that scale. Poisson arrivals of n per window have 1/sqrt(n); NaN with fewer than two windows."""
        windows = int(self.duration_s / window_s)
        if windows < 2:
            return math.nan
        times = [request.at_s for request in self.requests]
        counts, _ = np.histogram(times, bins=windows, range=(0.0, windows * window_s))
        return float(counts.std() / counts.mean()) if counts.any() else math.nan

    def window(self, start_s: float, duration_s: float) -> Trace:
        """What arrives in [start_s, start_s + duration_s), with the window's start as 0."""
        _require(
            start_s >= 0 and duration_s > 0, "a window needs a start of at least 0 and a duration above 0"
        )
        kept = tuple(
            replace(request, at_s=request.at_s - start_s)
            for request in self.requests
            if start_s <= request.at_s < start_s + duration_s
        )
        if not kept:
            raise UsageError(
                f"{self.name}: no request arrives between {start_s:g} and {start_s + duration_s:g} s; "
                f"the trace is {self.duration_s:.0f} s long",
                param="trace",
            )
        return replace(self, requests=kept, duration_s=duration_s)

    def stretched(self, factor: float) -> Trace:
        """Time runs `factor` times slower. Bursts become as much longer, so that a burst of ten seconds may
        turn into minutes of calm: use `with_rate_factor` to change the load."""
        _require(factor > 0, "a time scale must be above 0")
        moved = tuple(replace(request, at_s=request.at_s * factor) for request in self.requests)
        return replace(self, requests=moved, duration_s=self.duration_s * factor)

    def with_rate_factor(self, factor: float, seed: int) -> Trace:
        """The rate of every moment times `factor`; each burst stays where it is and lasts as long as it did.

        Below 1 each request is kept with probability `factor` (what one of 1/factor servers behind a random
        router sees). Above 1 each request is there `factor` times: its copies arrive up to `JITTER_S` from it,
        with the same lengths, sharing prefixes with other copies but not with the original. A fractional part is
        drawn for each request.
        """
        _require(factor > 0, "a rate must be above 0")
        rng = np.random.default_rng(seed)
        whole = int(factor)
        extra = rng.random(len(self.requests)) < factor - whole
        copies = whole + extra.astype(int)
        distinct = 1 + max((block for request in self.requests for block in request.prefix), default=0)
        made: list[TraceRequest] = []
        for request, times in zip(self.requests, copies.tolist(), strict=True):
            if times:
                made.append(request)
            for copy in range(1, times):
                at_s = request.at_s + float(rng.uniform(-JITTER_S, JITTER_S))
                prefix = tuple(block + copy * distinct for block in request.prefix)
                made.append(replace(request, at_s=min(max(at_s, 0.0), self.duration_s), prefix=prefix))
        made.sort(key=lambda request: request.at_s)
        return replace(self, requests=tuple(made))

    def at_rate(self, per_s: float, seed: int) -> Trace:
        """`with_rate_factor`, for a mean rate of `per_s` requests per second."""
        _require(
            self.rate_per_s > 0, f"{self.name}: a trace of no duration has no rate that could be changed"
        )
        return self.with_rate_factor(per_s / self.rate_per_s, seed)

    def with_count(self, count: int, seed: int) -> Trace:
        """Exactly `count` requests, drawn as `with_rate_factor` does; with the same seed, and as long as no copies
        are needed, fewer requests are always a part of more."""
        _require(count >= 1, "a trace needs at least one request")
        full = self.with_rate_factor(math.ceil(count / len(self)), seed) if count > len(self) else self
        order = np.random.default_rng(seed).permutation(len(full.requests))
        kept = sorted(order[:count].tolist())
        return replace(self, requests=tuple(full.requests[index] for index in kept))

    def with_lengths(
        self,
        *,
        prompt_scale: float = 1.0,
        output_scale: float = 1.0,
        max_prompt_tokens: int | None = None,
        min_output_tokens: int = 1,
        max_output_tokens: int | None = None,
    ) -> Trace:
        """Lengths times a scale, then within their limits (longer requests are shortened, not left out)."""
        _require(min(prompt_scale, output_scale) > 0, "a length scale must be above 0")
        _require(max(prompt_scale, output_scale) < math.inf, "a length scale must be finite")
        _require(min(max_prompt_tokens or 1, max_output_tokens or 1) >= 1, "a length cap must be at least 1")
        _require(
            max_output_tokens is None or min_output_tokens <= max_output_tokens,
            f"answers of at least {min_output_tokens} tokens cannot be cut to {max_output_tokens}",
        )
        block = max(1, round(self.block_tokens * prompt_scale))
        made = []
        for request in self.requests:
            prompt = _scaled(request.prompt_tokens, prompt_scale, max_prompt_tokens)
            output = max(min_output_tokens, _scaled(request.output_tokens, output_scale, max_output_tokens))
            prefix = request.prefix[: math.ceil(prompt / block)]
            made.append(TraceRequest(request.at_s, prompt, output, prefix))
        return replace(self, requests=tuple(made), block_tokens=block)


def _scaled(tokens: int, scale: float, cap: int | None) -> int:
    scaled = max(1, round(tokens * scale))
    return scaled if cap is None else min(scaled, cap)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message, param="trace")
