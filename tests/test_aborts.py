"""A request aborted at any stage of its life is gone, and its slots free, within one tick."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from harli_appliance.runtime.protocol import NewTokens, Sampling, Submission
from tests.conftest import Serving
from tests.test_runtime import prompt

if TYPE_CHECKING:
    from harli_appliance.runtime.sglang_runtime import SglangRuntime

LONG = 300  # tokens; a chunk has 64


def tick(runtime: SglangRuntime) -> list[NewTokens]:
    plan = runtime.plan()
    brought = list(runtime.execute(plan).tokens) if plan is not None else []
    return [*brought, *runtime.drain()]


def steps(count: int) -> Callable[[SglangRuntime], None]:
    def run(runtime: SglangRuntime) -> None:
        for _ in range(count):
            tick(runtime)

    return run


@pytest.mark.parametrize(
    ("reach", "length", "stage"),
    [
        (steps(0), LONG, "waiting"),
        (steps(1), LONG, "in the first chunk"),
        (steps(3), LONG, "in the middle of its prompt"),
        (steps(5), LONG, "after its last chunk"),
        (steps(9), LONG, "decoding"),
        (steps(1), 20, "after a prompt of one chunk"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_an_abort_frees_its_slots_within_a_tick(
    serving: Serving, reach: Callable[[SglangRuntime], None], length: int, stage: str, beside: bool
) -> None:
    def run() -> None:
        runtime, slots = serving.runtime, serving.slots
        alone = 0
        if beside:
            runtime.submit(Submission("r-10", prompt(900, 20), Sampling(max_tokens=100, ignore_eos=True)))
            tick(runtime)
            alone = 1
        # Its id begins like the other's, and SGLang aborts by prefix.
        runtime.submit(Submission("r-1", prompt(901, length), Sampling(max_tokens=100, ignore_eos=True)))
        reach(runtime)
        depth = runtime.depth()
        assert depth.running + depth.waiting == alone + 1
        runtime.abort("r-1")
        ends = [item for item in (*runtime.drain(), *tick(runtime)) if item.request == "r-1"]
        assert [(end.finish, end.tokens) for end in ends] == [("abort", ())], stage
        if beside:
            tick(runtime)
            (other,) = runtime.scheduler.running_batch.reqs
            # Its prompt and all that it has drawn but the last token, whose row comes with the next step.
            assert slots.counts().serving == 20 + len(other.output_ids) - 1
            runtime.abort("r-10")
            tick(runtime)
        runtime.plan()  # idle: SGLang's own check that nothing leaked
        assert slots.counts().serving == 0
        assert (runtime.depth().running, runtime.depth().waiting) == (0, 0)

    serving.lane.submit(run).result()


def test_aborting_what_is_over_or_unknown_does_nothing(serving: Serving) -> None:
    def run() -> None:
        runtime = serving.runtime
        runtime.submit(Submission("over", prompt(902, 10), Sampling(max_tokens=2, ignore_eos=True)))
        finishes = [item.finish for _ in range(3) for item in tick(runtime)]
        assert finishes[-1] == "length"
        for name in ("over", "unknown", ""):
            runtime.abort(name)
        assert tick(runtime) == []

    serving.lane.submit(run).result()
