"""SGLang in process: tokens are transformers' tokens, and ends are ends."""

from __future__ import annotations

import random
from typing import Any

import torch

from harli_appliance.runtime.protocol import NewTokens, Sampling, Submission
from tests.conftest import Serving


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(6, 300) for _ in range(length)]


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    return out[0, len(tokens) :].tolist()


def serve(serving: Serving, submissions: list[Submission], every: int = 2) -> dict[str, list[NewTokens]]:
    """Run requests to their end, the later ones joining `every` steps apart."""
    arriving = list(submissions)
    brought: dict[str, list[NewTokens]] = {s.id: [] for s in submissions}

    def run() -> None:
        step = 0
        while True:
            if arriving and step % every == 0:
                serving.runtime.submit(arriving.pop(0))
            step += 1
            plan = serving.runtime.plan()
            if plan is None and not arriving and not serving.runtime.depth().waiting:
                return
            outcome = serving.runtime.execute(plan) if plan else None
            for item in (*(outcome.tokens if outcome else ()), *serving.runtime.drain()):
                brought[item.request].append(item)

    serving.lane.submit(run).result()
    return brought


def tokens_of(items: list[NewTokens]) -> list[int]:
    return [token for item in items for token in item.tokens]


def test_overlapping_requests_get_the_tokens_of_transformers(serving: Serving, reference: Any) -> None:
    lengths = [5, 17, 1, 64, 200, 33]
    wanted = [12, 30, 9, 20, 10, 25]
    submissions = [
        Submission(f"same-{i}", prompt(i, n), Sampling(max_tokens=m, ignore_eos=True))
        for i, (n, m) in enumerate(zip(lengths, wanted, strict=True))
    ]
    brought = serve(serving, submissions)
    for submission, count in zip(submissions, wanted, strict=True):
        items = brought[submission.id]
        assert tokens_of(items) == greedy(reference, list(submission.prompt), count)
        assert items[-1].finish == "length"


def test_a_shared_prefix_is_taken_from_the_cache(serving: Serving, reference: Any) -> None:
    shared = prompt(40, 120)
    first, second = [*shared, 7, 8], [*shared, 9, 10, 11]
    serve(serving, [Submission("prefix-1", first, Sampling(max_tokens=4, ignore_eos=True))])
    brought = serve(serving, [Submission("prefix-2", second, Sampling(max_tokens=8, ignore_eos=True))])
    assert brought["prefix-2"][0].cached_tokens >= 120
    assert tokens_of(brought["prefix-2"]) == greedy(reference, second, 8)


def test_prompts_that_are_held_change_no_token(serving: Serving, reference: Any) -> None:
    """A prompt of several chunks is held before its first, between two, and once more."""
    first, second = prompt(70, 40), prompt(71, 300)

    def run() -> tuple[list[str], dict[str, list[int]]]:
        runtime, kinds = serving.runtime, []
        brought: dict[str, list[int]] = {"first": [], "second": []}

        def step(*, prompts: bool) -> bool:
            plan = runtime.plan(prompts=prompts)
            if plan is not None:
                kinds.append(plan.kind)
                for item in runtime.execute(plan).tokens:
                    brought[item.request] += item.tokens
            return plan is not None

        runtime.submit(Submission("first", first, Sampling(max_tokens=12, ignore_eos=True)))
        step(prompts=False)  # nothing else can run
        runtime.submit(Submission("second", second, Sampling(max_tokens=6, ignore_eos=True)))
        for prompts in (False, False, True, False, False, True, False):
            step(prompts=prompts)
        while step(prompts=False):
            pass
        assert serving.slots.counts().serving == 0
        return kinds, brought

    kinds, brought = serving.lane.submit(run).result()
    read, answered = "prefill", "decode"
    assert kinds[:8] == [read, answered, answered, read, answered, answered, read, answered]
    assert brought == {"first": greedy(reference, first, 12), "second": greedy(reference, second, 6)}


def test_an_aborted_request_ends_and_its_slots_are_free(serving: Serving) -> None:
    def run() -> tuple[int, int, list[NewTokens]]:
        runtime = serving.runtime
        runtime.submit(Submission("leave", prompt(50, 30), Sampling(max_tokens=500, ignore_eos=True)))
        for _ in range(3):
            plan = runtime.plan()
            assert plan is not None
            runtime.execute(plan)
        busy = serving.slots.counts().serving
        runtime.abort("leave")
        ends: list[NewTokens] = []
        while (plan := runtime.plan()) is not None:
            ends.extend(runtime.execute(plan).tokens)
        return busy, serving.slots.counts().serving, [*ends, *runtime.drain()]

    busy, after, ends = serving.lane.submit(run).result()
    assert busy > 0
    assert after == 0
    assert ends[-1].finish == "abort"


def test_an_aborted_waiting_request_ends_without_a_step(serving: Serving) -> None:
    def run() -> tuple[NewTokens, ...]:
        serving.runtime.submit(Submission("queued", prompt(51, 30), Sampling(max_tokens=5)))
        serving.runtime.abort("queued")
        assert serving.runtime.plan() is None
        return serving.runtime.drain()

    (end,) = serving.lane.submit(run).result()
    assert (end.request, end.finish) == ("queued", "abort")


def test_taken_slots_leave_served_tokens_alone(serving: Serving, reference: Any) -> None:
    """Training scribbles over the slots it took while requests are decoded."""
    ids = prompt(60, 90)

    def run() -> list[int]:
        runtime, slots = serving.runtime, serving.slots
        runtime.submit(Submission("beside", ids, Sampling(max_tokens=24, ignore_eos=True)))
        brought: list[int] = []
        taken = None
        for step in range(200):
            plan = runtime.plan()
            if plan is None:
                break
            for item in runtime.execute(plan).tokens:
                brought += item.tokens
            if step == 3:
                taken = slots.take(1500, evict=1500)
                assert taken is not None
                for buffer in (*slots.k_buffers, *slots.v_buffers):
                    buffer[taken] = 1e4
        assert taken is not None
        slots.give(taken)
        runtime.plan()  # idle: SGLang checks that no slot leaked
        return brought

    assert serving.lane.submit(run).result() == greedy(reference, ids, 24)
    counts = serving.slots.counts()
    assert counts.free + counts.cached + counts.serving == serving.slots.size


def test_a_slot_that_is_kept_is_noticed(serving: Serving) -> None:
    """Break the accounting on purpose: SGLang's own leak check must see it."""

    def run() -> str:
        allocator = serving.runtime.scheduler.token_to_kv_pool_allocator
        lost = allocator.alloc(3)
        try:
            serving.runtime.plan()
        except Exception as error:
            return str(error)
        finally:
            allocator.free(lost)
        return ""

    assert "leak" in serving.lane.submit(run).result()
