"""The pool on SGLang's own slots: counts, contiguous runs and the cache, with SGLang's leak check beside them."""

from __future__ import annotations

import random

import pytest
import torch

from harli_appliance.memory.pool import Lease, SlotPool
from harli_appliance.runtime.protocol import Sampling, Submission
from tests.conftest import Serving
from tests.test_runtime import prompt


def drain(serving: Serving) -> None:
    """Serve what there is to its end; SGLang checks for leaks when it has nothing more to do."""
    while (plan := serving.runtime.plan()) is not None:
        serving.runtime.execute(plan)


def submit(serving: Serving, name: str, length: int, answer: int) -> None:
    sampling = Sampling(max_tokens=answer, ignore_eos=True)
    serving.runtime.submit(Submission(name, prompt(hash(name) % 1000, length), sampling))


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_and_leases(serving: Serving, seed: int) -> None:
    def scenario() -> None:
        rng = random.Random(seed)
        pool = SlotPool(serving.slots, watermark=0.1, keep_cached=rng.choice([0.0, 0.3, 1.0]))
        leases: list[Lease] = []
        for turn in range(60):
            match rng.randrange(6):
                case 0:
                    submit(serving, f"mix-{seed}-{turn}", rng.randrange(5, 500), rng.randrange(1, 40))
                case 1 | 2:
                    contiguous = rng.random() < 0.5
                    grant = pool.grant_contiguous if contiguous else pool.grant
                    lease = grant(rng.randrange(1, 1500), lambda: None)
                    if lease is not None:
                        leases.append(lease)
                        if contiguous:
                            assert (lease.indices.diff() == 1).all()
                case 3 if leases:
                    leases.pop(rng.randrange(len(leases))).release()
                case 4:
                    serving.runtime.abort(f"mix-{seed}-{rng.randrange(turn + 1)}")
                case _:
                    pool.settle()
                    shortage = pool.shortage()
                    for lease in pool.revoke(shortage) if shortage else []:
                        lease.release()
                        leases.remove(lease)
                    pool.settle()
                    plan = serving.runtime.plan()
                    if plan is not None:
                        serving.runtime.execute(plan)
            use = pool.use()
            owned = torch.cat([torch.empty(0, dtype=torch.int64), *(lease.indices for lease in leases)])
            assert len(owned.unique()) == len(owned), "a slot was leased twice"
            assert use.free + use.serving + use.cached + use.leased == use.slots
            assert min(use.free, use.serving, use.cached) >= 0
            free = serving.slots._allocator.free_pages
            assert len(torch.cat([free, owned]).unique()) == len(free) + len(owned)
        for lease in leases:
            lease.release()
        pool.settle()
        drain(serving)
        use = pool.use()
        assert (use.leased, use.serving) == (0, 0)
        assert use.free + use.cached == use.slots

    serving.lane.submit(scenario).result()


def test_a_run_is_found_by_dropping_cache_entries(serving: Serving) -> None:
    def scenario() -> None:
        for at in range(6):
            submit(serving, f"fill-{at}", 500, 1)
        drain(serving)
        keeping = SlotPool(serving.slots, watermark=0.0, keep_cached=1.0)
        counts = serving.slots.counts()
        assert counts.cached >= 2900
        assert keeping.grant_contiguous(counts.free + 1, lambda: None) is None
        assert serving.slots.counts() == counts
        pool = SlotPool(serving.slots, watermark=0.0)
        lease = pool.grant_contiguous(3000, lambda: None)
        assert lease is not None
        assert (lease.indices.diff() == 1).all()
        lease.release()
        pool.settle()

    serving.lane.submit(scenario).result()


def test_a_prompt_that_is_partly_computed_counts_for_the_rest(serving: Serving) -> None:
    def scenario() -> None:
        before = serving.slots.demand()
        assert before == 0
        submit(serving, "long", 300, 10)
        whole = serving.slots.demand()
        assert 310 <= whole <= 320
        plan = serving.runtime.plan()
        assert plan is not None
        assert plan.prefill_tokens == 64
        assert serving.slots.demand() == whole - 64
        serving.runtime.execute(plan)
        drain(serving)
        assert serving.slots.demand() == 0

    serving.lane.submit(scenario).result()


def test_the_highest_run_is_taken_and_the_rest_is_in_order(serving: Serving) -> None:
    from harli_appliance.runtime.kv import _top_run

    free = torch.tensor([9, 2, 5, 4, 3, 12, 11, 20])
    run, rest = _top_run(free, 2)
    assert run is not None
    assert run.tolist() == [11, 12]
    assert rest.tolist() == [2, 3, 4, 5, 9, 20]
    run, rest = _top_run(free, 5)
    assert run is None
    assert rest.tolist() == sorted(free.tolist())
    assert _top_run(free[:0], 1)[0] is None
