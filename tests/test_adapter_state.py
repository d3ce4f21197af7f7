"""An adapter's state moves between the KV buffers and the host without changing a number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.training.adapter import Adapter
from harli_appliance.training.adapter_state import AdapterState
from harli_appliance.training.backbone import Backbone

SLOTS = 4000


class Rig:
    """An adapter on a private tiny model, with buffers full of rubbish around its state."""

    def __init__(self, reference: Any) -> None:
        backbone = Backbone(copy.deepcopy(reference).requires_grad_(False))
        self.adapter = Adapter(backbone, rank=4, alpha=8, seed=1)
        self.layers = [self.adapter.parameters(layer) for layer in range(len(backbone.layers))]
        self.buffers = [torch.full((SLOTS, backbone.kv_width), 1e3) for _ in range(2 * len(backbone.layers))]
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=0.01)
        self.state = AdapterState(self.layers, self.optimizer, self.buffers)

    def place(self, first: int) -> None:
        self.state.place(torch.arange(first, first + self.state.slots))

    def batch(self, seed: int) -> None:
        """One micro-batch of made-up gradients, in two pieces a layer."""
        generator = torch.Generator().manual_seed(seed)
        for layer in range(len(self.layers)):
            for total in self.state.gradients(layer):
                total.add_(torch.randn(total.shape, generator=generator))

    def step(self) -> None:
        self.optimizer.step()
        self.state.begin_step()

    def everything(self) -> list[Tensor]:
        held = [
            self.optimizer.state[p][name] for p in self.adapter.parameters() for name in ("step", "exp_avg")
        ]
        values = [tensor for p in self.adapter.parameters() for tensor in (p.data, p.grad)]
        return [tensor.clone() for tensor in (*values, *held) if tensor is not None]


@pytest.fixture
def rig(reference: Any) -> Rig:
    return Rig(reference)


def test_moving_at_any_moment_changes_no_bit(reference: Any) -> None:
    calm, moved = Rig(reference), Rig(reference)
    places = iter([7, 900, None, 3, None, None, 1500, 20, None, 8, 64])

    def move() -> None:
        first = next(places)
        if first is None:
            moved.state.park()
            for buffer in moved.buffers:
                buffer.fill_(float("nan"))  # what serving does with slots that it got back
        else:
            moved.place(first)

    for step in range(3):
        for micro in range(2):
            calm.batch(10 * step + micro)
            moved.batch(10 * step + micro)
            move()
        move()
        calm.step()
        moved.step()
    for found, wanted in zip(moved.everything(), calm.everything(), strict=True):
        assert torch.equal(found, wanted)
    assert any(value.abs().sum() > 0 for value in calm.everything())


def test_a_placed_state_lies_in_its_slots_and_nowhere_else(rig: Rig) -> None:
    rig.place(100)
    assert rig.state.placed
    rig.batch(1)
    rig.step()
    storages = {buffer.untyped_storage().data_ptr() for buffer in rig.buffers}
    for parameter in rig.adapter.parameters():
        moments = [rig.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        assert parameter.grad is not None
        for tensor in (parameter.data, parameter.grad, *moments):
            assert tensor.untyped_storage().data_ptr() in storages
    for buffer in rig.buffers:
        assert (buffer[:100] == 1e3).all()
        assert (buffer[100 + rig.state.slots :] == 1e3).all()
    before = rig.everything()
    rig.state.park()
    assert not rig.state.placed
    for buffer in rig.buffers:
        buffer.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, rig.everything(), strict=True))


def test_the_model_computes_the_same_wherever_its_adapter_lies(rig: Rig) -> None:
    rig.batch(1)
    rig.step()
    tokens = torch.arange(6, 60)[None]
    with torch.no_grad():
        parked = rig.adapter.peft_model(tokens).logits
        for first in (1, 17, 1003):
            rig.place(first)
            placed = rig.adapter.peft_model(tokens).logits
            rig.state.park()
            assert torch.equal(placed, parked)


def test_a_step_begun_again_has_nothing_left_behind(reference: Any) -> None:
    rig, other = Rig(reference), Rig(reference)
    rig.batch(1)
    rig.state.begin_step()
    rig.batch(2)
    found = rig.everything()
    other.batch(2)
    assert all(torch.equal(a, b) for a, b in zip(found, other.everything(), strict=True))


def test_a_checkpoint_is_taken_over_whole(reference: Any) -> None:
    first, second = Rig(reference), Rig(reference)
    first.place(30)
    first.batch(3)
    first.step()
    saved = {name: tensor.clone() for name, tensor in first.state.tensors().items()}
    second.place(200)
    second.state.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(first.everything(), second.everything(), strict=True))
    del saved["0.exp_avg"]
    with pytest.raises(KeyError):
        second.state.load(saved)
