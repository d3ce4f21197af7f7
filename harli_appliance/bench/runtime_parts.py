"""The measurements of ``harli bench runtime``, each on a given runtime. Knows no goals and prints nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harli_appliance.bench.runtime_plain import PlainDecoder
from harli_appliance.bench.runtime_rig import Bench, consume, prompt, request, time_to_first
from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.runtime.arguments import LORA_TARGETS
from harli_appliance.runtime.measuring import Attention, Projections, SglangStep, timed_steps

SHORT, MIXED = (128, 384), (128, 1024)
"""Shortest and longest prompt of a batch, which lie evenly: questions; questions to long conversations."""
CHUNK = 128
"""Prompt tokens in a step, at least: so many steps may the first request decode while others are prefilled."""
FEW = (1, 2, 3, 4)
BLOCK = 24
"""Steps that one contestant makes before the next has its turn; most of them are as in a batch that decodes on."""


def prompt_lengths(count: int, between: tuple[int, int] = SHORT) -> list[int]:
    shortest, longest = between
    return [shortest + (longest - shortest) * at // max(1, count - 1) for at in range(count)]


def attention_steps(
    bench: Bench, *, requests: int, rounds: int, plain: bool = False, lengths: tuple[int, int] = SHORT
) -> dict[str, float]:
    """Decode steps with our attention and with SGLang's, taking turns on the same requests.

    The ratios are medians over the rounds: each round compares neighbouring blocks, so that a machine that grows
    slower in between slows both.

    Args:
        plain: whether the plain decoder of the tiny model takes turns too, at the same lengths.
        lengths: of the shortest and the longest prompt.

    Returns:
        ``ours``, ``torch_native`` and perhaps ``plain``: median step in ms. ``speedup``: torch_native over ours.
        With `plain` also ``ratio_to_plain``, ``torch_native_ratio_to_plain`` and ``same_tokens``.
    """
    return dict(bench.on_lane(lambda: _attention_steps(bench, requests, rounds, plain, lengths)))


def _attention_steps(
    bench: Bench, requests: int, rounds: int, plain: bool, lengths: tuple[int, int]
) -> dict[str, float]:
    attention, longest = Attention(bench.runtime), lengths[1]
    answer = 2 * BLOCK * rounds + requests * longest // CHUNK + 2
    prompts = [prompt(at, length) for at, length in enumerate(prompt_lengths(requests, lengths))]
    batch = _Batch(bench, f"step-{longest}", prompts, answer)
    yardstick = PlainDecoder(bench.folder, prompts, longest + answer) if plain else None
    blocks: dict[str, list[float]] = {"ours": [], "torch_native": []}
    if yardstick is not None:
        blocks["plain"] = []
    for _ in range(rounds):
        for name in ("ours", "torch_native"):
            attention.use(ours=name == "ours")
            blocks[name].append(_median_ms(batch.step, BLOCK))
        if yardstick is not None:
            blocks["plain"].append(_median_ms(yardstick.step, 2 * BLOCK))
    attention.use(ours=True)
    brought = batch.finish()
    found = {name: statistics.median(taken) for name, taken in blocks.items()}
    found["speedup"] = _ratio(blocks["torch_native"], blocks["ours"])
    if yardstick is not None:
        found["ratio_to_plain"] = _ratio(blocks["ours"], blocks["plain"])
        found["torch_native_ratio_to_plain"] = _ratio(blocks["torch_native"], blocks["plain"])
        pairs = [
            token == other
            for row, column in zip(brought, zip(*yardstick.tokens, strict=True), strict=True)
            for token, other in zip(row, column, strict=False)
        ]
        found["same_tokens"] = sum(pairs) / len(pairs)
    return found


class _Batch:
    """Requests that all decode when this is made, and go on for `answer` tokens each.

    Args:
        name: begins their ids.
        answer: enough for the steps that are measured and those in which some still had no first token.
    """

    def __init__(self, bench: Bench, name: str, prompts: Sequence[Sequence[int]], answer: int) -> None:
        self._runtime = bench.runtime
        self._brought: list[list[int]] = [[] for _ in prompts]
        for at, tokens in enumerate(prompts):
            self._runtime.submit(request(f"{name}-{len(prompts)}-{at}", list(tokens), answer))
        while self.step() != ("decode", len(prompts)):
            pass

    def step(self) -> tuple[str, int] | None:
        """Kind and number of requests of a step; None when all have ended."""
        plan = self._runtime.plan()
        if plan is None:
            return None
        for item in self._runtime.execute(plan).tokens:
            self._brought[int(item.request.rpartition("-")[2])].extend(item.tokens)
        return plan.kind, len(plan.requests)

    def finish(self) -> list[list[int]]:
        """All tokens of each request, once all have ended."""
        while self.step() is not None:
            pass
        return self._brought


def few_steps(bench: Bench, *, rounds: int = 3, prompt_tokens: int = 64) -> dict[str, dict[str, float]]:
    """Decode steps of `FEW` requests with SGLang's projections and with ours, taking turns.

    Returns:
        For each number of requests ``ours_ms`` and ``sglang_ms``, medians, and ``speedup``, the median over the
        rounds of theirs over ours.
    """
    return {
        str(count): dict(bench.on_lane(partial(_few, bench, count, rounds, prompt_tokens))) for count in FEW
    }


def _few(bench: Bench, count: int, rounds: int, prompt_tokens: int) -> dict[str, float]:
    projections = Projections(bench.runtime)
    prompts = [prompt(at, prompt_tokens) for at in range(count)]
    batch = _Batch(bench, f"few-{count}", prompts, 2 * BLOCK * rounds + count + 2)
    blocks: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for ours, taken in blocks.items():
            projections.use(ours=ours)
            taken.append(_median_ms(batch.step, BLOCK))
    projections.use(ours=True)
    batch.finish()
    return {
        "ours_ms": statistics.median(blocks[True]),
        "sglang_ms": statistics.median(blocks[False]),
        "speedup": _ratio(blocks[False], blocks[True]),
    }


def _median_ms(step: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


async def overhead(bench: Bench, *, requests: int = 8, answer: int = 400) -> dict[str, float]:
    """Median tick of the engine and of SGLang's own step in it (ms), while requests decode."""
    async with bench.engine() as engine:
        with timed_steps(bench.runtime) as steps:
            batch = [request(f"tick-{at}", prompt(at, 64), answer) for at in range(requests)]
            await asyncio.gather(*(consume(engine, each) for each in batch))
    ticks = _ticks(steps, requests)
    tick = statistics.median(seconds for _, seconds in ticks)
    own = statistics.median(step.seconds for step, _ in ticks)
    return {
        "tick_ms": 1e3 * tick,
        "step_ms": 1e3 * own,
        "overhead_ms": 1e3 * (tick - own),
        "steps": len(ticks),
    }


def _ticks(steps: Sequence[SglangStep], requests: int) -> list[tuple[SglangStep, float]]:
    """Decode steps of the whole batch, with the seconds until the next one began."""
    return [
        (step, following.began - step.began)
        for step, following in itertools.pairwise(steps)
        if step.decode and following.decode and step.requests == following.requests == requests
    ]


async def prefix(bench: Bench, *, shared: int = 512, pairs: int = 5) -> dict[str, float]:
    """Median time to first token (ms) of requests, and of others that share their first tokens with them."""
    first, second = [], []
    async with bench.engine() as engine:
        await time_to_first(engine, request("prefix-warm", prompt(99, shared), 2))
        for at in range(pairs):
            start = prompt(1000 + at, shared)
            first.append(await time_to_first(engine, request(f"first-{at}", start + prompt(at, 8), 2)))
            second.append(await time_to_first(engine, request(f"second-{at}", start + prompt(50 + at, 8), 2)))
    return {"first_ms": 1e3 * statistics.median(first), "second_ms": 1e3 * statistics.median(second)}


async def hotload(
    bench: Bench, adapter: Path, *, requests: int = 8, loads: int = 3, rank: int = 16
) -> dict[str, float]:
    """The longest tick around the loading of adapters while requests decode, and the median tick (ms)."""
    write_adapter(bench.folder, adapter, rank)
    windows: list[tuple[float, float]] = []
    async with bench.engine() as engine:
        shelf = AdapterShelf(bench.runtime, bench.lane)
        with timed_steps(bench.runtime) as steps:
            batch = [request(f"hot-{at}", prompt(at, 64), 30 + 12 * loads) for at in range(requests)]
            serving = asyncio.gather(*(consume(engine, each) for each in batch))
            await _until(lambda: bool(steps) and steps[-1].decode and steps[-1].requests == requests)
            for at in range(loads):
                seen = len(steps)
                await _until(lambda seen=seen: len(steps) >= seen + 6)  # type: ignore[misc]
                began = time.perf_counter()
                await shelf.put(f"hot-{at}", adapter)
                windows.append((began, time.perf_counter()))
                await _until(lambda seen=seen: len(steps) >= seen + 10)  # type: ignore[misc]
            await serving
        for at in range(loads):
            await shelf.remove(f"hot-{at}")
        await shelf.close()
    ticks = [(step.began, step.began + seconds) for step, seconds in _ticks(steps, requests)]
    median = statistics.median(end - begin for begin, end in ticks)
    around = [
        end - begin
        for begin, end in ticks
        if any(end >= began and begin <= ended + median for began, ended in windows)
    ]
    load = max(ended - began for began, ended in windows)
    return {"median_ms": 1e3 * median, "longest_ms": 1e3 * max(around), "load_ms": 1e3 * load}


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for happens on another thread
        await asyncio.sleep(0.001)


def write_adapter(model: Path, folder: Path, rank: int) -> None:
    """A LoRA adapter of PEFT's format with small random weights, for every projection of a Llama-like model."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    shapes = {
        "q_proj": (hidden, heads * size),
        "k_proj": (hidden, kv_heads * size),
        "v_proj": (hidden, kv_heads * size),
        "o_proj": (heads * size, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    weights = {}
    for layer, (name, (wide, out)) in itertools.product(range(config["num_hidden_layers"]), shapes.items()):
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        at = f"base_model.model.model.layers.{layer}.{block}.{name}"
        weights[f"{at}.lora_A.weight"] = 0.01 * torch.randn(rank, wide)
        weights[f"{at}.lora_B.weight"] = 0.01 * torch.randn(out, rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LORA_TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2))
