"""How much serving alone can take under each promise: rates are tried until the capacity lies between two of them.

One ladder serves all promises, because what serving alone does depends on none of them. Knows rates and what
was found at them; how a rate is tried is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from harli_appliance.bench.compare_store import Rung
from harli_appliance.bench.verdict import ATTAINMENT_GOAL

CLIMB: Final = 1.6
"""Factor between rates while only one side of the capacity is known."""
CLOSE: Final = 1.2
"""Factor between the rates on both sides of it that is close enough."""
LOWEST: Final = 8.0
"""A rate so many times lower than the first is the lowest that is tried."""


@dataclass(frozen=True, slots=True)
class Promise:
    label: str
    tpot_ms: float


async def climb(
    promises: Sequence[Promise],
    first_per_s: float,
    most_rungs: int,
    attempt: Callable[[float], Awaitable[Rung]],
) -> list[Rung]:
    """Try rates until for each promise a kept and a broken rate are close to each other.

    A rate that breaks a promise is tried again, and the better try counts: of a dozen requests, one that a shared
    machine held up for a second would halve the capacity.

    Args:
        first_per_s: where to begin.
        most_rungs: no more rates are tried.
        attempt: serves alone at a rate.

    Returns:
        What was found, by rate.
    """
    rungs: list[Rung] = []
    while len(rungs) < most_rungs:
        rate = next((rate for promise in promises if (rate := _next(promise, rungs, first_per_s))), None)
        if rate is None:
            break
        rungs.append(await _best_of_two(rate, promises, attempt))
        rungs.sort(key=lambda rung: rung.rate_per_s)
    return rungs


async def _best_of_two(
    rate: float, promises: Sequence[Promise], attempt: Callable[[float], Awaitable[Rung]]
) -> Rung:
    rung = await attempt(rate)
    if all(rung.attainment[promise.label] >= ATTAINMENT_GOAL for promise in promises):
        return rung
    again = await attempt(rate)
    return max(rung, again, key=lambda found: sum(found.attainment.values()))


def capacity(promise: Promise, rungs: Sequence[Rung]) -> float | None:
    """The rate at which the promise breaks, requests per second; None when no rate keeps it.

    Between the last rate that keeps it and the first that does not, the p99 TPOT is taken to grow linearly.
    """
    kept, broken = _sides(promise, rungs)
    if kept is None:
        return None
    if broken is None:
        return kept.rate_per_s
    low, high = kept.tpot_p99_ms, broken.tpot_p99_ms
    if low is None or high is None or high <= promise.tpot_ms:
        return kept.rate_per_s  # it broke for another reason, such as the first token's time
    share = max(0.0, promise.tpot_ms - low) / (high - low)
    return kept.rate_per_s + share * (broken.rate_per_s - kept.rate_per_s)


def _sides(promise: Promise, rungs: Sequence[Rung]) -> tuple[Rung | None, Rung | None]:
    """The highest rate below which all keep the promise, and the next one."""
    kept: Rung | None = None
    for rung in rungs:
        if rung.attainment[promise.label] < ATTAINMENT_GOAL:
            return kept, rung
        kept = rung
    return kept, None


def _next(promise: Promise, rungs: Sequence[Rung], first: float) -> float | None:
    """The rate that says most about a promise; None when enough is known."""
    kept, broken = _sides(promise, rungs)
    if kept is None and broken is None:
        return first
    if broken is None and kept is not None:
        return kept.rate_per_s * CLIMB
    if kept is None and broken is not None:
        lower = broken.rate_per_s / CLIMB
        return lower if lower >= first / LOWEST else None
    assert kept is not None  # noqa: S101
    assert broken is not None  # noqa: S101
    if broken.rate_per_s / kept.rate_per_s <= CLOSE:
        return None
    return math.sqrt(kept.rate_per_s * broken.rate_per_s)
