"""Bursts that need the whole pool while a job trains: nothing fails, nobody waits long, no slot or bit is lost."""

from __future__ import annotations

import asyncio
import random

from harli_appliance.bench.reclaims import watched
from harli_appliance.runtime.protocol import Sampling, Submission
from tests.conftest import Serving
from tests.test_coserving import Rig, RigFactory, a_job, lesson, rig  # noqa: F401  fixtures
from tests.test_runtime import prompt

BURSTS = 5


async def burst(made: Rig, number: int, rng: random.Random) -> None:
    """Requests that come to more tokens than the pool has slots; some of their clients hang up."""
    sizes: list[tuple[int, int]] = []
    while sum(length + count for length, count in sizes) < 1.2 * made.pool.size:
        sizes.append((rng.randrange(100, 900), rng.randrange(10, 100)))
    leaves = set(rng.sample(range(len(sizes)), 2))

    async def ask(at: int, length: int, count: int) -> None:
        name = f"soak-{number}-{at}"
        submission = Submission(
            name, prompt(100 * number + at, length), Sampling(max_tokens=count, ignore_eos=True)
        )
        stream = made.engine.submit(submission)
        came = 0
        async for item in stream:
            came += len(item.tokens)
            if at in leaves:
                stream.abort()
                return
        assert came == count, f"{name} ended after {came} tokens"

    await asyncio.gather(*(ask(at, *size) for at, size in enumerate(sizes)))


async def test_bursts_of_the_whole_pool(rig: RigFactory, serving: Serving) -> None:
    calm = await rig(job=a_job("ftjob-calm", epochs=4, dropout=0.1), watermark=0.0)
    await asyncio.wait_for(calm.queue.ended.wait(), 120)
    made = await rig("naive", a_job("ftjob-soak", epochs=4, dropout=0.1), watermark=0.0)
    rng = random.Random(11)
    async with watched(made.pool) as watch:
        for number in range(BURSTS):
            begun = watch.units
            while watch.units < begun + 10 and not made.queue.ended.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            await burst(made, number, rng)
        await asyncio.wait_for(made.queue.ended.wait(), 120)
    assert made.queue.outcome == calm.queue.outcome == "succeeded"
    assert max(reclaim.units for reclaim in watch.reclaims) <= 1
    assert {reclaim.purpose for reclaim in watch.reclaims} == {"outputs", "activations", "adapter"}
    assert made.queue.losses == calm.queue.losses
    assert made.weights_of("ftjob-soak") == calm.weights_of("ftjob-calm")
    await serving.lane.run(made.pool.settle)
    use = made.pool.use()
    assert (use.leased, use.serving) == (0, 0)
    assert use.free + use.cached == use.slots
