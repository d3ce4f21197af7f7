"""Adapters by name: replaced while serving, each request finishing on the version that it began with."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import NotFound, UsageError
from harli_appliance.runtime.protocol import Sampling, Submission
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from tests.conftest import Serving
from tests.test_runtime import greedy, prompt


class NotingRuntime:
    """Keeps a list of what was loaded and unloaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_adapter(self, adapter_id: str, name: str, path: str) -> None:
        if path.endswith("corrupt"):
            raise UsageError("adapter cannot be served: corrupt")
        self.loaded.append(adapter_id)

    def unload_adapter(self, adapter_id: str, name: str) -> None:
        self.loaded.remove(adapter_id)


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane("inference")
    yield lane
    lane.close()


async def test_an_old_version_stays_until_its_last_request_has_ended(lane: Lane) -> None:
    runtime = NotingRuntime()
    shelf = AdapterShelf(runtime, lane)  # type: ignore[arg-type]
    await shelf.put("otter", Path("one"))
    old = shelf.begin("otter", "r1")
    assert shelf.begin("otter", "r2") == old
    await shelf.put("otter", Path("two"))
    new = shelf.begin("otter", "r3")
    assert old != new
    assert runtime.loaded == [old, new]
    shelf.end("r1")
    await shelf.close()
    assert runtime.loaded == [old, new]
    shelf.end("r2")
    shelf.end("r2")
    await shelf.close()
    assert runtime.loaded == [new]
    await shelf.remove("otter")
    with pytest.raises(NotFound):
        shelf.begin("otter", "r4")
    assert runtime.loaded == [new]
    shelf.end("r3")
    await shelf.close()
    assert runtime.loaded == []


async def test_a_forgotten_name_is_unloaded_once_nobody_uses_it(lane: Lane) -> None:
    runtime = NotingRuntime()
    shelf = AdapterShelf(runtime, lane)  # type: ignore[arg-type]
    await shelf.put("otter", Path("one"))
    served = shelf.begin("otter", "r1")
    shelf.keep_off("ia3")
    for name in ("otter", "ia3", "never there"):
        await shelf.forget(name)
        with pytest.raises(NotFound):
            shelf.begin(name, "r2")
    assert runtime.loaded == [served]
    shelf.end("r1")
    await shelf.close()
    assert runtime.loaded == []


async def test_a_version_that_cannot_be_loaded_leaves_the_old_one(lane: Lane) -> None:
    shelf = AdapterShelf(NotingRuntime(), lane)  # type: ignore[arg-type]
    await shelf.put("otter", Path("one"))
    served = shelf.begin("otter", "r1")
    with pytest.raises(UsageError):
        await shelf.put("otter", Path("corrupt"))
    assert shelf.begin("otter", "r2") == served


async def test_what_is_loaded_has_a_name_although_nobody_waits_for_it_any_more(lane: Lane) -> None:
    loading, go_on = threading.Event(), threading.Event()

    class SlowRuntime(NotingRuntime):
        def load_adapter(self, adapter_id: str, name: str, path: str) -> None:
            loading.set()
            assert go_on.wait(10)
            super().load_adapter(adapter_id, name, path)

    runtime = SlowRuntime()
    shelf = AdapterShelf(runtime, lane)  # type: ignore[arg-type]
    putting = asyncio.create_task(shelf.put("otter", Path("one"), "ftjob-1"))
    assert await asyncio.to_thread(loading.wait, 10)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert shelf.versions == ()
    go_on.set()
    await shelf.close()
    (version,) = shelf.versions
    assert (version.name, version.job) == ("otter", "ftjob-1")
    assert runtime.loaded == [version.adapter_id] == [shelf.begin("otter", "r1")]


def make_adapter(reference: Any, folder: Path, seed: int, rank: int = 4, rslora: bool = False) -> Path:
    """A random adapter that changes answers, saved in PEFT's format."""
    import copy

    backbone = Backbone(copy.deepcopy(reference).requires_grad_(False))
    adapter = Adapter(backbone, rank=rank, alpha=2 * rank, seed=seed, rslora=rslora)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    adapter.save(folder)
    return folder


def tuned(reference: Any, folder: Path, ids: list[int], count: int) -> list[int]:
    import copy

    from peft import PeftModel

    return greedy(PeftModel.from_pretrained(copy.deepcopy(reference), folder), ids, count)


async def test_a_request_finishes_on_the_version_that_it_began_with(
    serving: Serving, reference: Any, tmp_path: Path
) -> None:
    """Real SGLang: base, old and new version decode in one batch while the name moves."""
    first = make_adapter(reference, tmp_path / "first", 1)
    second = make_adapter(reference, tmp_path / "second", 2, rslora=True)
    shelf = AdapterShelf(serving.runtime, serving.lane)
    await shelf.put("moving", first)
    ids = prompt(500, 20)
    brought: dict[str, list[int]] = {"v-old": [], "v-base": [], "v-new": []}

    def submit(name: str, adapter: str | None) -> None:
        sampling = Sampling(max_tokens=24, ignore_eos=True)
        serving.runtime.submit(Submission(name, ids, sampling, adapter))

    def steps(count: int) -> bool:
        for _ in range(count):
            plan = serving.runtime.plan()
            if plan is None:
                return False
            for item in serving.runtime.execute(plan).tokens:
                brought[item.request] += item.tokens
        return True

    await serving.lane.run(submit, "v-old", shelf.begin("moving", "v-old"))
    await serving.lane.run(submit, "v-base", None)
    await serving.lane.run(steps, 6)
    await shelf.put("moving", second)
    await serving.lane.run(submit, "v-new", shelf.begin("moving", "v-new"))
    await serving.lane.run(steps, 200)
    shelf.end("v-old")
    shelf.end("v-new")
    await shelf.remove("moving")
    await shelf.close()
    assert brought["v-old"] == tuned(reference, first, ids, 24)
    assert brought["v-new"] == tuned(reference, second, ids, 24)
    assert brought["v-base"] == greedy(reference, ids, 24)
    assert len({tuple(tokens) for tokens in brought.values()}) == 3


@pytest.mark.parametrize("fault", ["rank", "targets", "corrupt", "missing", "config", "shape"])
async def test_what_does_not_fit_is_refused_by_name_and_serving_goes_on(
    serving: Serving, reference: Any, tmp_path: Path, fault: str
) -> None:
    folder = make_adapter(reference, tmp_path / "bad", 3, rank=32 if fault == "rank" else 4)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if fault == "targets":
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["nonsense_proj"]}))
    elif fault == "corrupt":
        weights.write_bytes(weights.read_bytes()[:200])
    elif fault == "missing":
        weights.unlink()
    elif fault == "config":
        config.write_text("{ not json")
    elif fault == "shape":
        tensors = {name: tensor[..., :-1].contiguous() for name, tensor in load_file(weights).items()}
        save_file(tensors, weights)
    shelf = AdapterShelf(serving.runtime, serving.lane)
    with pytest.raises(UsageError, match="misfit"):
        await shelf.put("misfit", folder)
    assert shelf.versions == ()
    ids = prompt(501, 12)

    def serve() -> list[int]:
        name = f"after-{fault}"
        serving.runtime.submit(Submission(name, ids, Sampling(max_tokens=5, ignore_eos=True)))
        found: list[int] = []
        while (plan := serving.runtime.plan()) is not None:
            for item in serving.runtime.execute(plan).tokens:
                found += item.tokens
        return found

    assert await asyncio.wrap_future(serving.lane.submit(serve)) == greedy(reference, ids, 5)
