"""Adapters by name: replaced while serving, each request finishing on the version that it began with."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import NotFound, UsageError
from harli_appliance.runtime.protocol import Sampling, Submission
from harli_appliance.training.adapter import TARGETS, Adapter
from harli_appliance.training.backbone import Backbone
from tests.conftest import Serving
from tests.test_runtime import greedy, prompt


class NotingRuntime:
    """Keeps a list of what was loaded and unloaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def read_adapter(self, name: str, path: str) -> str:
        if path.endswith("corrupt"):
            raise UsageError("adapter cannot be served: corrupt")
        return path

    def load_adapter(self, adapter_id: str, files: str) -> None:
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
        def load_adapter(self, adapter_id: str, files: str) -> None:
            loading.set()
            assert go_on.wait(10)
            super().load_adapter(adapter_id, files)

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


def make_adapter(
    reference: Any,
    folder: Path,
    seed: int,
    rank: int = 4,
    rslora: bool = False,
    targets: Sequence[str] = TARGETS,
) -> Path:
    """A random adapter that changes answers, saved in PEFT's format."""
    backbone = Backbone(copy.deepcopy(reference).requires_grad_(False))
    adapter = Adapter(backbone, rank=rank, alpha=2 * rank, seed=seed, rslora=rslora, targets=targets)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    adapter.save(folder)
    return folder


def tuned(reference: Any, folder: Path, ids: list[int], count: int) -> list[int]:
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


def answer(
    serving: Serving, request: str, ids: list[int], count: int, adapter: str | None = None
) -> list[int]:
    """Greedy tokens, on the inference lane."""

    def serve() -> list[int]:
        sampling = Sampling(max_tokens=count, ignore_eos=True)
        serving.runtime.submit(Submission(request, ids, sampling, adapter))
        found: list[int] = []
        while (plan := serving.runtime.plan()) is not None:
            for item in serving.runtime.execute(plan).tokens:
                found += item.tokens
        return found

    return serving.lane.submit(serve).result()


@pytest.mark.parametrize(
    "targets",
    [
        "k_proj",
        "v_proj",
        "k_proj,v_proj",
        "q_proj",
        "q_proj,k_proj",
        "up_proj",
        "up_proj,down_proj",
        "gate_proj",
    ],
)
async def test_whichever_projections_were_trained_answers_are_those_of_peft(
    serving: Serving, reference: Any, tmp_path: Path, targets: str
) -> None:
    folder = make_adapter(reference, tmp_path / "some", 4, targets=targets.split(","))
    shelf = AdapterShelf(serving.runtime, serving.lane)
    await shelf.put("some", folder)
    ids = prompt(502, 16)
    served = await asyncio.to_thread(
        answer, serving, f"some-{targets}", ids, 8, shelf.begin("some", f"some-{targets}")
    )
    shelf.end(f"some-{targets}")
    await shelf.remove("some")
    await shelf.close()
    assert served == tuned(reference, folder, ids, 8)
    assert served != greedy(reference, ids, 8)


Tensors = dict[str, torch.Tensor]
A, B = (f"base_model.model.model.layers.2.self_attn.o_proj.lora_{matrix}.weight" for matrix in "AB")


def described(**fields: object) -> Callable[[dict[str, Any], Tensors], None]:
    """Writes these into the configuration; None leaves a field out."""

    def write(config: dict[str, Any], tensors: Tensors) -> None:
        config |= fields
        for field in [name for name, value in fields.items() if value is None]:
            del config[field]

    return write


def narrower(config: dict[str, Any], tensors: Tensors) -> None:
    tensors |= {name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()}


def of_another_rank(config: dict[str, Any], tensors: Tensors) -> None:
    tensors |= {A: tensors[A][:2].contiguous(), B: tensors[B][:, :2].contiguous()}


def of_unequal_ranks(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[B] = tensors[B][:, :2].contiguous()


def without_b(config: dict[str, Any], tensors: Tensors) -> None:
    del tensors[B]


def not_finite(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[B][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (described(r=16), "its rank is 16, the largest is training.max_lora_rank = 8"),
        (described(r=2), r"lora_A.weight is of shape \[4, .*'r': 2 need \[2, "),
        (described(r=None), "'r' in .* is null; write its rank"),
        (described(r=0), "'r' in .* is 0; write its rank"),
        (described(r="4"), "'r' in .* is \"4\"; write its rank"),
        (described(lora_alpha=None), "'lora_alpha' in .* is null; write a number"),
        (described(lora_alpha=float("nan")), "'lora_alpha' in .* is NaN; write a number"),
        (described(target_modules=None), "'target_modules' in .* must list"),
        (described(target_modules=[1]), "'target_modules' in .* must list"),
        (described(target_modules=["nonsense_proj"]), "'target_modules' does not name .*; add it there"),
        (described(use_rslora=True), r"'use_rslora' is not served; multiply 'lora_alpha' by sqrt\(r\)"),
        (described(use_dora=True), "it is of the method DoRA; only LoRA"),
        (described(alpha_pattern={"q_proj": 3}), "'alpha_pattern' is not served; train it with one rank"),
        (described(rank_pattern={"q_proj": 3}), "'rank_pattern' is not served; train it with one rank"),
        (described(init_lora_weights="pissa_niter_4"), "a base model that .*'pissa_niter_4' has changed"),
        (narrower, "is of shape .*, this model and 'r': 4 need"),
        (of_another_rank, "o_proj.lora_A.weight is of shape"),
        (of_unequal_ranks, "o_proj.lora_B.weight is of shape"),
        (without_b, "o_proj.lora_B.weight is missing; save the adapter again"),
        (not_finite, "o_proj.lora_B.weight holds numbers that are not finite; train"),
    ],
)
async def test_an_adapter_that_would_be_served_wrongly_is_refused_in_a_line_that_says_why(
    serving: Serving,
    reference: Any,
    tmp_path: Path,
    change: Callable[[dict[str, Any], Tensors], None],
    why: str,
) -> None:
    folder = make_adapter(reference, tmp_path / "bad", 3)
    weights, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    change(config, tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, weights)
    shelf = AdapterShelf(serving.runtime, serving.lane)
    with pytest.raises(UsageError, match=f"adapter 'misfit' cannot be served: .*{why}") as refusal:
        await shelf.put("misfit", folder)
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_adapter")
    assert shelf.versions == ()


@pytest.mark.parametrize("fault", ["corrupt", "missing", "config", "list"])
async def test_files_that_cannot_be_read_are_refused_by_name_and_serving_goes_on(
    serving: Serving, reference: Any, tmp_path: Path, fault: str
) -> None:
    folder = make_adapter(reference, tmp_path / "bad", 3)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if fault == "corrupt":
        weights.write_bytes(weights.read_bytes()[:200])
    elif fault == "missing":
        weights.unlink()
    else:
        config.write_text("{ not json" if fault == "config" else "[1]")
    shelf = AdapterShelf(serving.runtime, serving.lane)
    with pytest.raises(UsageError, match="misfit"):
        await shelf.put("misfit", folder)
    assert shelf.versions == ()
    ids = prompt(501, 12)
    served = await asyncio.to_thread(answer, serving, f"after-{fault}", ids, 5)
    assert served == greedy(reference, ids, 5)
