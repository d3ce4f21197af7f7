"""A step that fails inside SGLang ends its own requests and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harli_appliance.runtime.protocol import NewTokens, Sampling, StepPlan, Submission
from tests.conftest import Serving
from tests.test_runtime import greedy, prompt


class Broken(Exception):
    """A fault in the model's forward pass."""


def run_with_fault(
    serving: Serving, submissions: list[Submission], breaks: Callable[[StepPlan], bool]
) -> Any:
    """Step until idle; the model raises in the first step that `breaks` picks."""
    runtime = serving.runtime
    brought: dict[str, list[NewTokens]] = {s.id: [] for s in submissions}
    arriving = list(submissions)

    def explode(*args: object) -> None:
        raise Broken("kernel exploded")

    def run() -> bool:
        broken = False
        for step in range(300):
            if arriving and step % 3 == 0:
                runtime.submit(arriving.pop(0))
            plan = runtime.plan()
            if plan is None:
                if arriving:
                    continue
                return broken
            if broken or not breaks(plan):
                items: tuple[NewTokens, ...] = runtime.execute(plan).tokens
            else:
                hook = runtime.model.get_submodule("model").register_forward_pre_hook(explode)
                with pytest.raises(Broken):
                    runtime.execute(plan)
                hook.remove()
                items = runtime.recover(plan, Broken("kernel exploded"))
                broken = True
            for item in items:
                brought[item.request].append(item)
        raise AssertionError("it never became idle")

    assert serving.lane.submit(run).result()
    return brought


def asking(name: str, seed: int, length: int, count: int) -> Submission:
    return Submission(name, prompt(seed, length), Sampling(max_tokens=count, ignore_eos=True))


@pytest.mark.parametrize("kind", ["decode", "prefill", "chunk"])
def test_the_batch_ends_with_the_error_and_the_others_go_on(
    serving: Serving, reference: Any, kind: str
) -> None:
    length = 200 if kind == "chunk" else 20  # the chunk size of the fixture is 64
    submissions = [
        asking(f"{kind}-first", 300, 20, 30),
        asking(f"{kind}-second", 301, length, 30),
        asking(f"{kind}-third", 302, 25, 8),
    ]

    def breaks(plan: StepPlan) -> bool:
        if kind == "decode":
            return plan.kind == "decode" and len(plan.requests) == 2
        return plan.kind == "prefill" and plan.requests == (f"{kind}-second",)

    before = serving.slots.counts().serving
    brought = run_with_fault(serving, submissions, breaks)
    victims = {name for name, items in brought.items() if items[-1].finish == "error"}
    assert victims == ({f"{kind}-first", f"{kind}-second"} if kind == "decode" else {f"{kind}-second"})
    for name in victims:
        assert "kernel exploded" in (brought[name][-1].error or "")
    for submission in submissions:
        if submission.id not in victims:
            tokens = [token for item in brought[submission.id] for token in item.tokens]
            assert tokens == greedy(reference, list(submission.prompt), submission.sampling.max_tokens)
    assert serving.slots.counts().serving == before == 0, "slots of the failed requests are free"
