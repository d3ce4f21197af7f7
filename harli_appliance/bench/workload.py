"""Synthetic traffic that looks like people: calm and bursts, short and long, plausible questions. Seeded.

Arrivals are a two-state Markov-modulated Poisson process (calm, burst; exponential stays) whose rate also
swings slowly, as over a day. Lengths of prompts and answers are log-normal, clipped. Knows nothing of HTTP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from harli_appliance.errors import UsageError


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    index: int
    at_s: float
    """Seconds after the start of the replay; sent then, whether or not earlier ones are answered."""
    prompt: str
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Clipped to [low, high]; `spread` is the standard deviation of the logarithm."""

    median: float
    spread: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        value = rng.lognormal(math.log(self.median), self.spread)
        return int(min(max(round(value), self.low), self.high))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Defaults suit a 135M model on one CPU core: about 0.4 requests/s and 13 tokens/s on average, which is
    a third of what it can do, with bursts that put four to eight requests in flight."""

    calm_per_s: float = 0.2
    burst_per_s: float = 0.9
    calm_s: float = 12.0
    """Mean stay; no stay is longer than twice this."""
    burst_s: float = 6.0
    swing: float = 0.3
    """Share by which the rate rises and falls over `day_s`."""
    day_s: float = 90.0
    prompt_words: LogNormal = LogNormal(median=20, spread=0.4, low=8, high=42)
    answer_tokens: LogNormal = LogNormal(median=28, spread=0.45, low=16, high=64)

    def __post_init__(self) -> None:
        if min(self.calm_per_s, self.burst_per_s, self.calm_s, self.burst_s, self.day_s) <= 0:
            raise UsageError("traffic: rates and times must be above 0")
        if not 0 <= self.swing < 1:
            raise UsageError("traffic: swing must be in [0, 1)")


def bursty(seed: int, traffic: Traffic = Traffic()) -> Iterator[PlannedRequest]:
    """Endless requests in order of time; the same seed gives the same ones.

    Args:
        seed: of everything random.
        traffic: rates and lengths.
    """
    rng = np.random.default_rng(seed)
    for index, at_s in enumerate(_arrivals(rng, traffic)):
        yield PlannedRequest(index, at_s, _prompt(rng, traffic), traffic.answer_tokens.draw(rng))


def recurring(
    requests: Sequence[PlannedRequest],
    period_s: float,
    seed: int,
    traffic: Traffic = Traffic(),
    *,
    repeat_share: float = 0.25,
) -> Iterator[PlannedRequest]:
    """`requests` every `period_s`, endlessly: at the same times, for answers of the same lengths, so that what was
    measured with them is what can be expected. Most ask something new.

    Args:
        repeat_share: share that asks what the original asked, so that answers can be compared; 0 to 1.
    """
    rng = np.random.default_rng(seed)
    for index in itertools.count():
        turn, place = divmod(index, len(requests))
        original = requests[place]
        prompt = original.prompt if rng.random() < repeat_share else _prompt(rng, traffic)
        yield PlannedRequest(index, turn * period_s + original.at_s, prompt, original.answer_tokens)


def for_seconds(requests: Iterator[PlannedRequest], seconds: float) -> list[PlannedRequest]:
    """Those sent in the first `seconds`."""
    return list(takewhile(lambda request: request.at_s < seconds, requests))


def _arrivals(rng: np.random.Generator, traffic: Traffic) -> Iterator[float]:
    """Thinning (Lewis and Shedler 1979): candidates at the highest rate, kept with rate(t) / highest."""
    start, in_burst = 0.0, False
    while True:
        mean = traffic.burst_s if in_burst else traffic.calm_s
        end = start + min(rng.exponential(mean), 2 * mean)
        rate = traffic.burst_per_s if in_burst else traffic.calm_per_s
        highest = rate * (1 + traffic.swing)
        at_s = start + rng.exponential(1 / highest)
        while at_s < end:
            now = rate * (1 + traffic.swing * math.sin(2 * math.pi * at_s / traffic.day_s))
            if rng.random() < now / highest:
                yield at_s
            at_s += rng.exponential(1 / highest)
        start, in_burst = end, not in_burst


def _prompt(rng: np.random.Generator, traffic: Traffic) -> str:
    """A question, with as much talk around it as its drawn length allows."""
    words = traffic.prompt_words.draw(rng)
    parts = [QUESTIONS[rng.integers(len(QUESTIONS))]]
    for remark in rng.permutation(len(REMARKS)):
        if sum(len(part.split()) for part in parts) >= words:
            break
        parts.insert(0, REMARKS[remark])
    return " ".join(parts)


QUESTIONS = (
    "How do I keep basil alive on a windowsill?",
    "What should I cook with two eggs, an onion and some rice?",
    "Why does my bicycle chain squeak after rain?",
    "How long should I boil potatoes for a salad?",
    "What is the difference between a lake and a pond?",
    "Can you suggest a name for a grey cat?",
    "How do I remove a coffee stain from a wool sweater?",
    "What is a good way to learn ten new words a day?",
    "Why is the sky red in the evening?",
    "How do I write a polite reminder about an unpaid invoice?",
    "What should I pack for three days in the mountains?",
    "How do tides work?",
    "What is the best time to plant tulips?",
    "How can I fall asleep faster?",
    "What does a conductor do in an orchestra?",
    "How do I politely decline a wedding invitation?",
    "Why do cats purr?",
    "What is a simple recipe for pancakes?",
    "How do I explain fractions to a child?",
    "What is the difference between weather and climate?",
    "How often should I water a cactus?",
    "What is a good first book about astronomy?",
    "How do I stop my glasses from fogging up?",
    "Why does bread rise?",
    "How do I start a conversation with a new neighbour?",
    "What can I do on a rainy Sunday with two children?",
    "How do I sharpen a kitchen knife?",
    "What is the oldest city in Europe?",
    "How do airplanes stay in the air?",
    "What is a good stretching exercise for the back?",
    "How do I make my home office warmer in winter?",
    "What is the meaning of the saying about the early bird?",
    "How do I train for a run of five kilometres?",
    "Why do leaves change their colour in autumn?",
    "How do I choose a ripe melon?",
    "What should I ask at the end of a job interview?",
    "How does a refrigerator work?",
    "What are three facts about penguins?",
    "How do I repair a small hole in a wall?",
    "How do I thank a teacher at the end of the year?",
)

REMARKS = (
    "I have about half an hour before my guests arrive.",
    "My sister and I have been arguing about this since breakfast.",
    "Please keep it short, I am reading this on my phone.",
    "I am quite new to this, so simple words would help.",
    "My daughter has to give a short talk at school tomorrow.",
    "We moved into a small flat last month.",
    "I tried a few things already, but nothing really helped.",
    "My grandfather always had an answer to this one.",
    "It does not have to be perfect.",
    "Somebody at work asked me and I did not know what to say.",
    "I read two articles and they said opposite things.",
    "The shops are closed today.",
    "We live near the sea, in case that matters.",
    "I would rather not spend any money on it.",
    "One example would be enough.",
    "Good morning!",
)
