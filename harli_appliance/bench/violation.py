"""For how long a promise was broken: the time during which some answer was behind its schedule.

Token i of an answer is due i times the promised TPOT after the first one. Knows times of tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

TOKENS: Final = "tokens.json"
"""File of the times of tokens."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Seconds.

    Attributes:
        total_s: during which at least one answer was behind.
        last_s: from the beginning until the last moment at which one was; 0 when none ever was.
    """

    total_s: float
    last_s: float


def violation(answers: Iterable[Sequence[float]], tpot_s: float, since: float) -> Violation:
    """
    Args:
        answers: when each token of each answer came, in order.
        tpot_s: promised.
        since: what was late before does not count.
    """
    late: list[tuple[float, float]] = []
    for arrivals in answers:
        for index, came in enumerate(arrivals):
            due = max(since, arrivals[0] + index * tpot_s)
            if came > due:
                late.append((due, came))
    total, until = 0.0, since
    for due, came in sorted(late):
        total += max(0.0, came - max(due, until))
        until = max(until, came)
    return Violation(total, until - since)
