"""A bursty trace for when there is no file: arrivals and lengths shaped like published ones. Seeded.

Arrivals are a Gamma-modulated Poisson process: the rate of each interval is drawn from a Gamma distribution, so
that counts per interval are negative binomial. Lengths are log-normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.errors import UsageError


@dataclass(frozen=True, slots=True)
class Bursts:
    """The rate over time.

    Attributes:
        rate_per_s: mean.
        variation: coefficient of variation of the rate between intervals; 0 is a Poisson process.
        interval_s: how long a rate lasts.
    """

    rate_per_s: float = 1.0
    variation: float = 1.0
    interval_s: float = 5.0

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.variation < 0 or self.interval_s <= 0:
            raise UsageError(
                "bursts: rate and interval must be above 0, the variation at least 0", param="trace"
            )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths, cut to [1, cap]. Defaults: medians and standard deviations of the logarithm of
    the 19,366 requests of Azure's conversation trace of 2023, capped at its longest ones."""

    prompt_median: float = 1020.0
    prompt_spread: float = 0.985
    prompt_cap: int = 14_050
    output_median: float = 129.0
    output_spread: float = 0.859
    output_cap: int = 1000

    def __post_init__(self) -> None:
        if min(self.prompt_median, self.output_median, self.prompt_cap, self.output_cap) < 1:
            raise UsageError("lengths: medians and caps must be at least 1", param="trace")


def synthetic_trace(
    duration_s: float, seed: int, bursts: Bursts = Bursts(), lengths: Lengths = Lengths()
) -> Trace:
    """A trace of `duration_s` seconds; the same arguments give the same one."""
    if duration_s <= 0:
        raise UsageError("a trace must last longer than 0 s", param="trace")
    rng = np.random.default_rng(seed)
    times: list[float] = []
    for interval in range(math.ceil(duration_s / bursts.interval_s)):
        rate = bursts.rate_per_s
        if bursts.variation > 0:
            shape = bursts.variation**-2
            rate = float(rng.gamma(shape, rate / shape))
        start = interval * bursts.interval_s
        length = min(bursts.interval_s, duration_s - start)
        times += sorted((start + length * rng.random(rng.poisson(rate * length))).tolist())
    prompts = rng.lognormal(math.log(lengths.prompt_median), lengths.prompt_spread, len(times))
    outputs = rng.lognormal(math.log(lengths.output_median), lengths.output_spread, len(times))
    requests = tuple(
        TraceRequest(at_s, _clip(prompt, lengths.prompt_cap), _clip(output, lengths.output_cap))
        for at_s, prompt, output in zip(times, prompts.tolist(), outputs.tolist(), strict=True)
    )
    return Trace(f"synthetic (seed {seed})", requests, duration_s)


def _clip(value: float, cap: int) -> int:
    return min(max(1, round(value)), cap)
