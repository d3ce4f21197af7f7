"""Whatever is asked together, and whenever: every answer is transformers' or PEFT's, and no slot is lost.

200 mixes a run, the same ones each time: 100 on Llama, 100 on Qwen3.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures import CONFIGS, make
from tests.conftest import Serving
from tests.greedy import TIE, wrong_tokens
from tests.mixes import ADAPTERS, LONGEST, Ask, Bench, Judge, check_mixes, save_random_adapter
from tests.test_runtime import greedy, prompt

MIXES = 100
"""On each of two models."""
ONCE = Ask(tick=0, length=60, stem=0, share=0.0, seed=1, count=12, adapter=None, abort=None)
AGAIN = dataclasses.replace(ONCE, tick=20)


@pytest.fixture(scope="module")
def adapters(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    folders = {name: root / name for name in ADAPTERS}
    for seed, folder in enumerate(folders.values()):
        save_random_adapter(reference, folder, seed)
    return folders


@pytest.fixture(scope="module")
def bench(serving: Serving, reference: Any, adapters: dict[str, Path]) -> Iterator[Bench]:
    for name, folder in adapters.items():
        files = serving.runtime.read_adapter(name, str(folder))
        serving.lane.submit(serving.runtime.load_adapter, name, files).result()
    yield Bench(serving.runtime, serving.slots, Judge(reference, adapters), chunk=64)
    for name in adapters:
        serving.lane.submit(serving.runtime.unload_adapter, name, name).result()


def everything_happened(seen: Mapping[str, int]) -> bool:
    """Whether the mixes exercised what they are for."""
    wanted = {
        "mixes": MIXES,
        "longest": LONGEST,
        "steps with several adapters": 100,
        "cached prompts": 50,
        "aborted before a token": 5,
        "aborted amid tokens": 10,
        "prompts in chunks": 50,
        "tokens": 1000,
    }
    return seen["shortest"] == 1 and all(seen[name] >= least for name, least in wanted.items())


def test_random_mixes_on_llama(serving: Serving, bench: Bench) -> None:
    seen = serving.lane.submit(check_mixes, bench, MIXES).result()
    assert everything_happened(seen), seen


def test_random_mixes_on_qwen3(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(CONFIGS["qwen3"](), tmp_path / "qwen3", tiny_model)
    child = subprocess.run(
        [sys.executable, "-m", "tests.mix_child", str(folder), str(MIXES)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert child.returncode == 0, child.stderr[-5000:]
    seen = json.loads(child.stdout.splitlines()[-1])
    assert everything_happened(seen), seen


def test_a_disturbed_cache_row_is_noticed(serving: Serving, bench: Bench) -> None:
    def disturb(tick: int) -> None:
        if tick == AGAIN.tick:  # the first answer is complete, and its prompt is in the prefix cache
            for buffer in serving.slots.k_buffers:
                buffer.add_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))

    def run() -> list[str]:
        wrong = bench.judge.wrong(bench.serve([ONCE, AGAIN], disturb))
        counts = serving.slots.counts()
        taken = serving.slots.take(
            counts.free + counts.cached, evict=counts.cached
        )  # forget what was disturbed
        assert taken is not None
        serving.slots.give(taken)
        return wrong

    (line,) = serving.lane.submit(run).result()
    assert "greedy is" in line


def test_swapped_adapters_are_noticed(
    serving: Serving, bench: Bench, reference: Any, adapters: dict[str, Path]
) -> None:
    first, second = ADAPTERS
    mix = [Ask(0, 20, 0, 0.0, seed, 8, adapter, None) for seed, adapter in enumerate((*ADAPTERS, None))]
    served = serving.lane.submit(bench.serve, mix).result()
    assert bench.judge.wrong(served) == []
    swapped = Judge(reference, {first: adapters[second], second: adapters[first]})
    lines = swapped.wrong(served)
    assert [line.split(":")[0] for line in lines] == [first, second]


def test_a_tie_is_no_mistake_and_anything_else_is(reference: Any) -> None:
    ids = prompt(80, 30)
    served = greedy(reference, ids, 6)
    assert wrong_tokens(reference, [(ids, served), (ids[:9], greedy(reference, ids[:9], 3))]) == []
    for at in range(len(served)):
        changed = [*served[:at], (served[at] + 1) % 300, *served[at + 1 :]]
        (line,) = wrong_tokens(reference, [(ids, changed)])
        assert f"token {at} " in line

    class Nearly:
        """The reference, with the second best token lifted to within rounding of the best."""

        def __call__(self, *args: Any, **more: Any) -> Any:
            out = reference(*args, **more)
            best = out.logits.topk(2, dim=-1)
            out.logits.scatter_(-1, best.indices[..., 1:], best.values[..., :1] - TIE / 2)
            return out

    with torch.no_grad():
        second = int(reference(torch.tensor([ids])).logits[0, -1].topk(2).indices[1])
    assert wrong_tokens(reference, [(ids, [second])])
    assert wrong_tokens(Nearly(), [(ids, [second])]) == []
