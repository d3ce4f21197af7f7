"""A rehearsal allocates what training needs and leaves nothing behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import ConfigError
from harli_appliance.finetuner import Finetuner
from harli_appliance.memory.pool import SlotPool
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.job_run import RunOptions
from harli_appliance.training.rehearsal import Rehearsal
from harli_appliance.training.units import MicroBatch
from tests.queue_rig import settings  # noqa: F401  fixture
from tests.radix_slots import RadixSlots

TOKENS, WINDOW, RANK = 48, 16, 4
OPTIONS = RunOptions(
    window_tokens=WINDOW,
    sequence_tokens=TOKENS,
    checkpoint_every_steps=1,
    keep_checkpoints=1,
    checkpoints=Path("/nonexistent"),
)


def buffers_of(backbone: Backbone, slots: int, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    k, v = ([torch.zeros(slots, backbone.kv_width, dtype=dtype) for _ in backbone.layers] for _ in range(2))
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as on a CPU", "as on a GPU"])
def test_every_kind_of_unit_is_run_in_the_lent_rows_only(
    dtype: torch.dtype, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    next_unit = MicroBatch.next_unit

    def noted(self: MicroBatch, window: int, layers: int) -> Any:
        unit = next_unit(self, window, layers)
        if unit is not None:
            kinds.append(unit.kind)
        return unit

    steps: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(MicroBatch, "next_unit", noted)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
    model = copy.deepcopy(reference).to(dtype)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    backbone = Backbone(model)
    buffers = buffers_of(backbone, 4000, dtype)
    rehearsal = Rehearsal(backbone, buffers, rank=RANK, options=OPTIONS, leasable=3900, times=2)
    state, rows = rehearsal.state_slots, rehearsal.slots
    rehearsal.place(torch.arange(5, 5 + state))
    for _ in range(2):
        rehearsal.make(torch.arange(10 + state, 10 + state + rows))
    rehearsal.close()
    layers = len(backbone.layers)
    assert [kinds.count(kind) for kind in ("forward", "loss", "backward")] == [
        2 * 3 * layers,
        2 * 3,
        2 * (3 * layers + layers - 1),  # K and V of all layers but the last are computed again
    ]
    assert steps == [1, 1]
    for buffer in [*buffers[0], *buffers[1]]:
        assert not buffer[:5].any()
        assert not buffer[5 + state : 10 + state].any()
        assert not buffer[10 + state + rows :].any()
    assert buffers[0][0][5 : 5 + state].any()
    assert buffers[0][0][10 + state :].any()
    after = model.state_dict()
    assert after.keys() == weights.keys(), "the adapter is off the model"
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


# -- on every stream ---------------------------------------------------------------------------------------


class Device:
    """Lanes with two splits; knows where the training lane is."""

    splits = ("a", "b")
    place: str | None = None

    def training_places(self) -> Iterator[str | None]:
        for split in (None, *self.splits):
            self.place = split
            yield split
        self.place = None


class Rig:
    def __init__(self, settings: Any, reference: Any, slots: int) -> None:
        self.lanes = Lane("inference"), Lane("training")
        self.pool = SlotPool(RadixSlots(slots), watermark=0.0)
        self.device = Device()
        backbone = Backbone(copy.deepcopy(reference))
        k, v = buffers_of(backbone, slots, torch.float32)
        self.finetuner = Finetuner(
            settings,
            settings.training.sizes(gpu=False),
            codec=SimpleNamespace(),  # type: ignore[arg-type]
            queue=SimpleNamespace(),  # type: ignore[arg-type]
            pool=self.pool,
            slots=SimpleNamespace(k_buffers=k, v_buffers=v),  # type: ignore[arg-type]
            shelf=SimpleNamespace(),  # type: ignore[arg-type]
            scheduler=SimpleNamespace(fuses=False),  # type: ignore[arg-type]
            lane=self.lanes[1],
            disk=self.lanes[1],
        )
        self.finetuner._backbone = backbone

    async def rehearse(self) -> None:
        await self.finetuner._rehearse(self.device, self.lanes[0])  # type: ignore[arg-type]

    def leased(self) -> int:
        self.pool.settle()
        return self.pool.use().leased

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()


@pytest.fixture
def rig(settings, reference, request) -> Iterator[Rig]:
    made = Rig(settings, reference, slots=request.param)
    yield made
    made.close()


ROOMY, TOO_SMALL = 20_000, 40


@pytest.mark.parametrize("rig", [ROOMY], indirect=True)
async def test_a_step_is_made_on_every_stream_and_all_slots_come_back(rig: Rig, monkeypatch):
    made = []
    make = Rehearsal.make

    def noted(self: Rehearsal, slots: torch.Tensor) -> None:
        made.append((threading.current_thread().name.partition("_")[0], rig.device.place))
        make(self, slots)

    monkeypatch.setattr(Rehearsal, "make", noted)
    await rig.rehearse()
    assert made == [("training", None), ("training", "a"), ("training", "b"), ("inference", None)]
    assert rig.leased() == 0
    assert rig.pool.use().leased_max > 0


@pytest.mark.parametrize("rig", [TOO_SMALL], indirect=True)
async def test_a_pool_that_is_too_small_for_training_only_serves(rig: Rig):
    await rig.rehearse()
    assert rig.pool.use().leased_max == 0


@pytest.mark.parametrize("rig", [ROOMY], indirect=True)
async def test_a_device_that_is_too_small_says_which_setting_to_change(rig: Rig, monkeypatch):
    def full(self: Rehearsal, slots: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(Rehearsal, "make", full)
    with pytest.raises(ConfigError, match=r"beside 20000 cache slots: set memory\.pool_slots lower"):
        await rig.rehearse()
    assert rig.leased() == 0
