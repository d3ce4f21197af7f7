"""A request that SGLang takes back when the cache is full goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

from harli_appliance.runtime.protocol import Sampling, Submission
from tests.conftest import Serving
from tests.test_runtime import prompt, serve, tokens_of

ROOM = 12  # slots that are left to three answers


def squeezed(serving: Serving, submissions: list[Submission]) -> tuple[dict[str, list[int]], set[str]]:
    """What the requests answer when the cache shrinks in the middle, and which of them were taken back."""
    brought: dict[str, list[int]] = {submission.id: [] for submission in submissions}
    retracted: set[str] = set()

    def run() -> None:
        runtime, slots = serving.runtime, serving.slots
        for submission in submissions:
            runtime.submit(submission)
        taken, steps = None, 0
        while runtime.depth().running + runtime.depth().waiting:
            plan = runtime.plan()
            retracted.update(queued.rid for queued in runtime.scheduler.waiting_queue if queued.output_ids)
            if plan is None and taken is not None:  # SGLang waits for more room than is left
                slots.give(taken)
                taken = None
            for item in runtime.execute(plan).tokens if plan is not None else ():
                brought[item.request] += item.tokens
            steps += 1
            if steps == 25:
                counts = slots.counts()
                taken = slots.take(counts.free + counts.cached - ROOM, evict=counts.cached)
        if taken is not None:
            slots.give(taken)
        runtime.plan()  # idle: SGLang checks that no slot leaked

    serving.lane.submit(run).result()
    return brought, retracted


@pytest.mark.parametrize(
    "asked",
    [
        {"frequency_penalty": 0.8},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.8},
        # Half of the tokens end the answer, once they may be drawn.
        {"min_tokens": 30, "stop_token_ids": tuple(range(0, 300, 2))},
        {"frequency_penalty": 0.4, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_penalties_and_lengths_count_what_was_answered_before(
    serving: Serving, asked: dict[str, Any]
) -> None:
    sampling = Sampling(max_tokens=70, ignore_eos="min_tokens" not in asked, **asked)
    submissions = [Submission(f"squeezed-{i}", prompt(800 + i, 60), sampling) for i in range(3)]
    alone = {one.id: tokens_of(serve(serving, [one])[one.id]) for one in submissions}
    together, retracted = squeezed(serving, submissions)
    assert retracted, "the cache must have been full"
    assert together == alone
