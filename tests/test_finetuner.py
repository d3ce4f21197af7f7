"""What the trainer is given of the served model, with as little as possible around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from harli_appliance.engine.adapters import AdapterShelf
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import ApplianceUnavailable, UsageError
from harli_appliance.finetuner import Finetuner
from harli_appliance.training.backbone import Kernels
from tests.queue_rig import (  # noqa: F401  fixtures
    GOOD,
    database,
    queue,
    settings,
    spec,
    upload,
)


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane("training")
    yield lane
    lane.close()


def finetuner_of(settings: Any, lane: Lane, queue: Any = None, shelf: Any = None) -> Finetuner:
    finetuner = Finetuner(
        settings,
        settings.training.sizes(gpu=False),
        codec=SimpleNamespace(),  # type: ignore[arg-type]
        queue=queue,
        pool=SimpleNamespace(leasable=100),  # type: ignore[arg-type]
        slots=SimpleNamespace(k_buffers=(), v_buffers=()),  # type: ignore[arg-type]
        shelf=shelf,
        scheduler=SimpleNamespace(),  # type: ignore[arg-type]
        lane=lane,
        disk=lane,
    )
    finetuner._backbone = SimpleNamespace(twin=lambda: None)  # type: ignore[assignment]
    return finetuner


async def test_other_work_gets_its_turn_between_two_pieces_of_a_training_file(
    settings,
    lane,
    tmp_path,
    monkeypatch,
):
    happened: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def encode(example, codec):
        happened.append("example")
        begun.set()
        assert go_on.wait(10)
        return example

    def run_of(job, examples, *more):
        return len(examples), len(more[-1])

    monkeypatch.setattr("harli_appliance.finetuner.ENCODED_AT_ONCE", 2)
    monkeypatch.setattr("harli_appliance.finetuner.encode", encode)
    monkeypatch.setattr("harli_appliance.finetuner.JobRun", run_of)
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    data.write_bytes(GOOD * 5)
    held_out.write_bytes(GOOD)
    finetuner = finetuner_of(settings, lane)
    starting = asyncio.create_task(finetuner.start_job(SimpleNamespace(), data, held_out))
    assert await asyncio.to_thread(begun.wait, 10)
    lane.submit(happened.append, "other work")
    go_on.set()
    assert await starting == (5, 1)
    assert happened == ["example"] * 2 + ["other work"] + ["example"] * 4


async def test_a_training_file_that_cannot_be_read_now_is_no_fault_of_the_job(settings, lane, tmp_path):
    finetuner = finetuner_of(settings, lane)
    with pytest.raises(ApplianceUnavailable, match="Is a directory; check its disk") as error:
        await finetuner.start_job(SimpleNamespace(), tmp_path, None)
    assert error.value.code == "storage_unavailable"


async def test_what_was_learned_is_kept_although_it_cannot_be_served(
    settings,
    queue,
    spec,
    lane,
):
    class Full:
        def read_adapter(self, name: str, path: str) -> str:
            return path

        def load_adapter(self, adapter_id: str, files: str) -> None:
            raise UsageError("there is no place for another adapter")

    def save_adapter(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")

    discarded: list[bool] = []
    run: Any = SimpleNamespace(save_adapter=save_adapter, discard_checkpoints=lambda: discarded.append(True))
    await queue.create_job(spec)
    job = await queue.next_job()
    shelf = AdapterShelf(Full(), lane)  # type: ignore[arg-type]
    await finetuner_of(settings, lane, queue, shelf).finish_job(job, run)
    assert (await queue.job(job.id)).status == "succeeded"
    folder = await queue.adapter_folder(job.id)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    events, _ = await queue.events(job.id)
    assert [event.message for event in events if event.level == "warn"] == [
        "The adapter can be downloaded, but not served: there is no place for another adapter"
    ]
    assert shelf.versions == ()
    assert discarded == [True]


async def test_what_the_database_did_not_take_is_not_served(settings, queue, spec, lane, monkeypatch):
    class Runtime:
        def read_adapter(self, name: str, path: str) -> str:
            return path

        def load_adapter(self, adapter_id: str, files: str) -> None:
            return None

        def unload_adapter(self, adapter_id: str, name: str) -> None:
            return None

    run: Any = SimpleNamespace(save_adapter=lambda folder: None, discard_checkpoints=lambda: None)
    await queue.create_job(spec)
    job = await queue.next_job()
    shelf = AdapterShelf(Runtime(), lane)  # type: ignore[arg-type]
    finetuner = finetuner_of(settings, lane, queue, shelf)
    with monkeypatch.context() as full:
        full.setattr(queue, "succeed", AsyncMock(side_effect=ApplianceUnavailable("the disk is full")))
        with pytest.raises(ApplianceUnavailable):
            await finetuner.finish_job(job, run)
    assert shelf.versions == (), "a person may cancel the job now"
    await finetuner.finish_job(job, run)
    assert [version.job for version in shelf.versions] == [job.id]


@pytest.mark.parametrize(
    ("gpu", "wanted", "fused"), [(True, True, True), (True, False, False), (False, True, False)]
)
async def test_fused_kernels_are_for_gpus_and_can_be_switched_off(
    settings, lane, monkeypatch, reference, gpu, wanted, fused
):
    kernels = Kernels(fused=("norms",))
    monkeypatch.setattr("harli_appliance.runtime.weights.shared_model", lambda model, folder: reference)
    monkeypatch.setattr("harli_appliance.finetuner.fuse", lambda model: kernels)
    training = settings.training.model_copy(update={"fused_kernels": wanted})
    finetuner = finetuner_of(settings.model_copy(update={"training": training}), lane)
    monkeypatch.setattr(finetuner, "_rehearse", AsyncMock())
    cuda = SimpleNamespace() if gpu else None
    await finetuner.prepare(SimpleNamespace(model=None), Path(), cuda, lane)  # type: ignore[arg-type]
    assert (finetuner._backbone.kernels is kernels) == fused
