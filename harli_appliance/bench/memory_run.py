"""How fast slots change hands, measured on a running engine: leases, copies, the cache's price, and reclaims.

Knows pool, slots and units; the inference lane is where slots may be touched. What the numbers should be is in
`memory_bench`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from harli_appliance.api.ports import AppliancePort, ChatCall
from harli_appliance.bench.compare_plan import ComparePlan
from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.memory_bench import FOUND
from harli_appliance.bench.reclaims import Reclaim, Watch, watched
from harli_appliance.bench.session import Session, Tell
from harli_appliance.bench.system import InProcess
from harli_appliance.bench.workload import PlannedRequest
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import EngineFault
from harli_appliance.memory.pool import Lease, SlotPool
from harli_appliance.memory.rows import RowBlock
from harli_appliance.runtime.kv import SglangSlots

LEASED: Final = 4096
ROUNDS: Final = 2000
COPIED: Final = 1024
"""Slots of a copy."""
COPIES: Final = 20
PROMPTS: Final = 8
PROMPT_WORDS: Final = 200
GREEDY: Final = 5
"""Requests of a burst: together they may become longer than the pool."""
ANSWER: Final = 4000
UNITS: Final = 8
"""That training runs between two bursts, at least."""
GIVE_UP_S: Final = 60.0


async def measure_memory(
    appliance: AppliancePort,
    pool: SlotPool,
    slots: SglangSlots,
    inference: Lane,
    task: Mapping[str, Any],
    tell: Tell,
) -> None:
    """Write ``found.json``.

    Args:
        task: ``plan`` (a `ComparePlan`), ``bursts``, ``model`` and ``out``.
    """
    plan = ComparePlan.model_validate(task["plan"])
    model = appliance.models()[0].id
    prompts = Prompts(Path(task["model"]))
    session = Session(
        InProcess(appliance),
        model,
        prompts,
        sequence_tokens=plan.sequence_tokens,
        ttft_ms=plan.ttft_ms,
        seed=plan.seed,
    )
    await session.open()
    await session.use("naive")
    found: dict[str, Any] = {"slots": pool.size}
    tell("Leases", 0.0, f"of {LEASED} slots")
    found["leases"] = await inference.run(lease_times, slots)
    tell("Leases", 1.0, "")
    tell("Copies", None, "")
    found["copies"] = await inference.run(copy_speed, pool, slots)
    tell("Copies", 1.0, "")
    found["cache"] = await _price_of_the_cache(appliance, model, prompts, slots, inference, tell)
    await session.training.start()
    taken_back = await reclaims(appliance, model, pool, int(task["bursts"]), tell)
    found["reclaims"] = [asdict(reclaim) for reclaim in taken_back]
    (Path(task["out"]) / FOUND).write_text(json.dumps(found), encoding="utf-8")


# -- leases --------------------------------------------------------------------------------------------------


def lease_times(slots: SglangSlots, rounds: int = ROUNDS, count: int = LEASED) -> dict[str, dict[str, float]]:
    """Microseconds to lease `count` slots and to give them back to SGLang, any slots and consecutive ones.

    In between, small leases come back in another order than they went, as after hours of traffic.
    """
    pool, rng = SlotPool(slots, watermark=0.0), random.Random(7)
    return {
        "any": _lease_times(pool, pool.grant, rng, rounds, count),
        "contiguous": _lease_times(pool, pool.grant_contiguous, rng, rounds, count),
    }


def _lease_times(
    pool: SlotPool, grant: Callable[..., Lease | None], rng: random.Random, rounds: int, count: int
) -> dict[str, float]:
    taken, given = [], []
    small: list[Lease] = []
    for _ in range(rounds):
        started = time.perf_counter_ns()
        lease = grant(count, _nothing)
        taken.append((time.perf_counter_ns() - started) / 1e3)
        if lease is None:
            raise EngineFault(f"{count} slots could not be leased in an idle pool")
        started = time.perf_counter_ns()
        lease.release()
        pool.settle()
        given.append((time.perf_counter_ns() - started) / 1e3)
        if len(small) == 8:
            small.pop(rng.randrange(8)).release()
        if (extra := pool.grant(rng.randrange(1, 64), _nothing)) is not None:
            small.append(extra)
    for lease in small:
        lease.release()
    pool.settle()
    return {
        **{f"lease_p{p}_us": float(np.percentile(taken, p)) for p in (50, 99)},
        **{f"release_p{p}_us": float(np.percentile(given, p)) for p in (50, 99)},
    }


def _nothing() -> None:
    """Nobody takes these leases back."""


# -- copies --------------------------------------------------------------------------------------------------


def copy_speed(pool: SlotPool, slots: SglangSlots, count: int = COPIED) -> dict[str, float]:
    """Bytes a second from the rows of scattered slots to host memory and back, as a micro-batch is swapped."""
    lease = pool.grant(count, _nothing)
    if lease is None:
        raise EngineFault(f"{count} slots could not be leased in an idle pool")
    scattered = lease.indices[torch.randperm(count)]
    blocks = [RowBlock([buffer], scattered) for buffer in (*slots.k_buffers, *slots.v_buffers)]
    size = count * sum(
        buffer.shape[1] * buffer.element_size() for buffer in (*slots.k_buffers, *slots.v_buffers)
    )
    out, back = [], []
    for _ in range(COPIES):
        started = time.perf_counter()
        rows = [block.read(0, count).to("cpu") for block in blocks]
        out.append(time.perf_counter() - started)
        started = time.perf_counter()
        for block, values in zip(blocks, rows, strict=True):
            block.write(0, values.to(scattered.device))
        back.append(time.perf_counter() - started)
    lease.release()
    pool.settle()
    return {
        "mib": size / 2**20,
        "out_bytes_per_s": size / float(np.median(out)),
        "in_bytes_per_s": size / float(np.median(back)),
    }


# -- the prefix cache ----------------------------------------------------------------------------------------


async def _price_of_the_cache(
    appliance: AppliancePort, model: str, prompts: Prompts, slots: SglangSlots, inference: Lane, tell: Tell
) -> list[dict[str, float]]:
    """For shares of the pool that stay cached: what training can lease, and what is left of the cache."""
    for at in range(PROMPTS):
        tell("Prefix cache", at / PROMPTS, "prompts")
        request = PlannedRequest(at, 0.0, prompts.words(PROMPT_WORDS, f"cached {at}"), 1)
        await _answer(appliance, model, request.prompt, 1)
    cached = (await inference.run(slots.counts)).cached
    shares = (1.0, cached / 2 / slots.size, 0.0)
    found = [await inference.run(cache_price, slots, share) for share in shares]
    tell("Prefix cache", 1.0, "")
    return found


def cache_price(slots: SglangSlots, keep: float) -> dict[str, float]:
    """Lease all that a pool with this `keep_cached` gives."""
    pool, step = SlotPool(slots, watermark=0.0, keep_cached=keep), 64
    before, leases = slots.counts().cached, []
    while (lease := pool.grant(step, _nothing)) is not None:
        leases.append(lease)
    found = {
        "keep_cached": keep,
        "leased": float(sum(map(len, leases))),
        "cached_before": float(before),
        "cached_after": float(slots.counts().cached),
    }
    for lease in leases:
        lease.release()
    pool.settle()
    return found


async def _answer(appliance: AppliancePort, model: str, text: str, tokens: int) -> None:
    """Ask, and leave after the first delta."""
    messages = [{"role": "user", "content": text}]
    answer = await appliance.chat(ChatCall(model, messages, max_tokens=tokens, temperature=0.0))
    try:
        async for _ in answer:
            break
    finally:
        answer.abort()


# -- reclaims ------------------------------------------------------------------------------------------------


async def reclaims(
    appliance: AppliancePort, model: str, pool: SlotPool, bursts: int, tell: Tell
) -> list[Reclaim]:
    """Bursts of requests that could fill the pool, each while training holds slots."""
    async with watched(pool) as watch:
        for burst in range(bursts):
            tell("Reclaims", burst / bursts, f"{len(watch.reclaims)} leases")
            await _until_training_holds(pool, watch)
            await asyncio.gather(
                *(_answer(appliance, model, f"burst {burst} {at}", ANSWER) for at in range(GREEDY))
            )
    tell("Reclaims", 1.0, f"{len(watch.reclaims)} leases")
    return watch.reclaims


async def _until_training_holds(pool: SlotPool, watch: Watch) -> None:
    """Training is in the middle of a micro-batch."""
    begun, deadline = watch.units, time.monotonic() + GIVE_UP_S
    while watch.units < begun + UNITS or not any(lease.purpose == "activations" for lease in pool.leases()):
        if time.monotonic() > deadline:
            raise EngineFault(f"training got no slots in {GIVE_UP_S:g} s; see the log")
        await asyncio.sleep(0.002)
