"""Several jobs at once on one backbone: each is, bit for bit, the job that ran alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from harli_appliance.api.ports import Job
from harli_appliance.training.activations import footprint
from tests.conftest import Serving
from tests.test_coserving import SEQUENCE_TOKENS, Rig, RigFactory, a_job, lesson, rig  # noqa: F401  fixtures
from tests.test_runtime import greedy, prompt

PLAIN = a_job("ftjob-plain", epochs=2)
DROPPING = replace(a_job("ftjob-dropping", epochs=3, dropout=0.2), seed=8, lora_rank=2)
LARGE = replace(a_job("ftjob-large", epochs=2), seed=9, batch_size=6, lora_rank=8, priority=30)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not reached():  # noqa: ASYNC110  the trainer tells nobody
            await asyncio.sleep(0.002)


def steps(made: Rig, job: Job) -> int:
    return len(made.queue.told[job.id])


async def test_each_of_several_jobs_is_bitwise_the_one_alone(
    rig: RigFactory,
    serving: Serving,
    reference: object,
) -> None:
    jobs = [PLAIN, DROPPING, LARGE]
    alone = {}
    for job in jobs:
        made = await rig(job=job, serve=False)
        await asyncio.wait_for(made.queue.ended.wait(), 120)
        alone[job.id] = (made.queue.told[job.id], made.weights_of(job.id))
    assert len({weights for _, weights in alone.values()}) == 3

    again = [replace(job, id=f"{job.id}-together") for job in jobs]
    made = await rig(jobs=again, serve=False)
    most_running = 0
    while not made.queue.ended.is_set():
        tokens = await made.answer(f"beside-{most_running}-{made.trainer.state().tokens}", prompt(2, 30), 6)
        assert tokens == greedy(reference, prompt(2, 30), 6), "the base model is served as it is"
        running = made.trainer.state().running
        most_running = max(most_running, len(running))
        assert sum(job.share for job in running) in (0, pytest.approx(1))
    assert most_running == 3
    for job in jobs:
        together = f"{job.id}-together"
        assert made.queue.outcomes[together] == "succeeded"
        assert (made.queue.told[together], made.weights_of(together)) == alone[job.id]
    assert made.pool.use().leased == 0


async def test_stopping_one_leaves_the_others_untouched(rig: RigFactory) -> None:
    """One is cancelled, one fails, one is paused and resumed; the last one is the undisturbed one."""
    calm = await rig(job=replace(PLAIN, id="ftjob-calm"), serve=False)
    await asyncio.wait_for(calm.queue.ended.wait(), 120)

    endless = a_job("ftjob-endless", epochs=1000)
    exploding = a_job("ftjob-exploding", epochs=30, rate=1e30)
    pausing = replace(DROPPING, id="ftjob-pausing")
    made = await rig(jobs=[endless, exploding, pausing, PLAIN], serve=False)
    await until(lambda: steps(made, PLAIN) >= 1 and steps(made, pausing) >= 1 and steps(made, endless) >= 1)
    made.queue.ask("pause", pausing.id)
    made.trainer.units.wake()
    await until(lambda: made.queue.paused.is_set())
    made.queue.ask("cancel", endless.id)
    made.trainer.units.wake()
    await until(lambda: "ftjob-endless" in made.queue.outcomes)
    made.queue.resume(pausing)
    await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert made.queue.outcomes["ftjob-endless"] == "cancelled"
    assert made.queue.outcomes["ftjob-exploding"].startswith("failed: loss_")
    assert made.queue.outcomes[pausing.id] == made.queue.outcomes[PLAIN.id] == "succeeded"
    assert made.queue.told[PLAIN.id] == calm.queue.told["ftjob-calm"]
    assert made.weights_of(PLAIN.id) == calm.weights_of("ftjob-calm")
    await asyncio.sleep(0.1)
    assert made.engine.state().pool.leased == 0


async def test_jobs_that_do_not_fit_the_pool_together_take_turns_in_it(
    rig: RigFactory,
    serving: Serving,
) -> None:
    first, second = replace(PLAIN, id="ftjob-calm"), replace(DROPPING, id="ftjob-dropping-calm")
    calm = await rig(jobs=[first, second], serve=False)
    await asyncio.wait_for(calm.queue.ended.wait(), 120)
    batch = footprint(calm.backbone, SEQUENCE_TOKENS).slots
    leasable = max(calm.slots.values()) + batch
    assert leasable < sum(calm.slots.values()) + batch
    jobs = [PLAIN, DROPPING]
    made = await rig(
        jobs=jobs, watermark=(serving.slots.size - leasable + 0.5) / serving.slots.size, serve=False
    )
    assert made.pool.leasable == leasable
    await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert set(made.queue.outcomes.values()) == {"succeeded"}
    for job, undisturbed in zip(jobs, (first, second), strict=True):
        assert made.queue.told[job.id] == calm.queue.told[undisturbed.id]
        assert made.weights_of(job.id) == calm.weights_of(undisturbed.id)


async def test_a_job_that_is_not_at_its_turn_is_stopped_while_nothing_may_run(
    rig: RigFactory,
) -> None:
    first, second = a_job("ftjob-first", epochs=1000), a_job("ftjob-second", epochs=1000)
    made = await rig("serve_only", jobs=[first, second], serve=False)
    await until(lambda: len(made.trainer.state().running) == 2)
    for job in (second, first):
        made.queue.ask("cancel", job.id)
        made.trainer.units.wake()
        await until(lambda job=job: job.id in made.queue.outcomes)  # type: ignore[misc]
    assert made.trainer.state().running == ()


async def test_fifo_trains_one_after_the_other(rig: RigFactory) -> None:
    first, second = replace(PLAIN, id="ftjob-first"), replace(PLAIN, id="ftjob-second")
    made = await rig(jobs=[first, second], order="fifo", serve=False)
    while "ftjob-first" not in made.queue.outcomes:
        assert steps(made, second) == 0
        await asyncio.sleep(0.005)
    await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert made.queue.told[first.id] == made.queue.told[second.id]


async def test_a_job_of_higher_priority_comes_further_in_the_same_time(rig: RigFactory) -> None:
    slow, fast = a_job("ftjob-slow", epochs=1000), a_job("ftjob-fast", epochs=1000)
    made = await rig(jobs=[slow, replace(fast, priority=40)], serve=False)
    await until(lambda: steps(made, fast) >= 24)
    assert steps(made, slow) <= 18, "a quarter of it, and what a busy machine makes of device time"
    shares = {job.id: job.share for job in made.trainer.state().running}
    assert shares["ftjob-fast"] > 0.6 > 0.4 > shares["ftjob-slow"]
    made.trainer.heard(replace(slow, priority=40))
    before = steps(made, slow), steps(made, fast)
    await until(lambda: steps(made, slow) >= before[0] + 8)
    assert steps(made, fast) - before[1] <= 2 * 8 + 6, "as many, not four times as many"
    for job in (slow, fast):
        made.queue.ask("cancel", job.id)
    made.trainer.units.wake()
    await asyncio.wait_for(made.queue.ended.wait(), 30)
