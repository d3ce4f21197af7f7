"""Kept outputs: what is spared, and gradients that are the same with them, without, and when they go."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.training.activations import footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.kept_outputs import kept_slots
from harli_appliance.training.objectives import Likelihood
from harli_appliance.training.packing import pack
from harli_appliance.training.units import MicroBatch
from tests.test_units import POOL, a_trained_adapter, buffers, examples, trained, zeros  # noqa: F401  fixture

WINDOW, ROOM = 16, 110
Disturb = Callable[[MicroBatch, dict[int, Tensor]], None]
"""Called before each unit with the slots that are lent, by number."""


def in_units(
    backbone: Backbone, adapter: Adapter, lent_layers: int, disturb: Disturb, *, keeps_kv: bool = False
) -> tuple[float, list[Tensor]]:
    """Loss and gradients with outputs of the last `lent_layers` layers kept."""
    data = examples(4, (50, 33, 7, 90))
    loss, total = 0.0, zeros(backbone, adapter)
    for number, sequence in enumerate(pack(data, ROOM)):
        need = footprint(backbone, len(sequence), keeps_kv=keeps_kv).slots
        each = kept_slots(backbone, adapter.projections, len(sequence))
        slots = torch.randperm(POOL, generator=torch.Generator().manual_seed(number))
        lent = {at: slots[need + at * each : need + (at + 1) * each] for at in range(lent_layers)}
        assert need + lent_layers * each <= POOL
        rows = buffers(backbone)
        batch = MicroBatch(
            backbone, adapter, sequence, buffers=rows, slots=slots[:need],
            objective=Likelihood(sum(example.learned_tokens for example in data)), loss_tokens=16,
            dropout_key=number, gradients=total.__getitem__, keeps_kv=keeps_kv,
        )  # fmt: skip
        batch.keep_outputs(list(lent.values()))
        while batch.next_unit(WINDOW, 1) is not None:
            gone = set(lent)
            disturb(batch, lent)
            for taken in gone - set(lent):  # another's now
                for buffer in (*rows[0], *rows[1]):
                    buffer[slots[need + taken * each : need + (taken + 1) * each]] = float("nan")
            left = batch.units_left(WINDOW)
            unit = batch.next_unit(WINDOW, 1)
            assert unit is not None
            unit.run()
            assert batch.units_left(WINDOW) == left - 1
        loss += batch.loss
    return loss, [gradient for layer in total for gradient in layer]


def calm(batch: MicroBatch, lent: dict[int, Tensor]) -> None:
    pass


class Storm:
    """Takes slots back at random, in any stage."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.during: set[str] = set()

    def __call__(self, batch: MicroBatch, lent: dict[int, Tensor]) -> None:
        unit = batch.next_unit(WINDOW, 1)
        if lent and unit is not None and self._rng.random() < 0.05:
            number = self._rng.choice(list(lent))
            batch.drop_outputs(number)
            del lent[number]
            self.during.add(unit.kind)


@pytest.mark.parametrize("keeps_kv", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3},
        {"method": "dora", "dropout": 0.2},
        {"method": "ia3"},
        {"targets": ("q_proj", "down_proj")},
    ],
    ids=str,
)
def test_gradients_are_the_same_bit_for_bit(reference: Any, options: dict[str, Any], keeps_kv: bool) -> None:
    backbone, adapter = a_trained_adapter(reference, **options)
    layers = len(backbone.layers)
    loss, wanted = in_units(backbone, adapter, 0, calm, keeps_kv=keeps_kv)
    storms = [Storm(seed) for seed in range(4)]
    found = [
        in_units(backbone, adapter, lent, disturb, keeps_kv=keeps_kv)
        for lent, disturb in [(layers, calm), (layers // 2, calm), *((layers, storm) for storm in storms)]
    ]
    assert {kind for storm in storms for kind in storm.during} >= {"forward", "backward"}
    for other, gradients in found:
        assert other == loss
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize(("lent", "computed"), [(0, True), (None, False)])
def test_backward_computes_no_frozen_projection_whose_outputs_were_kept(
    trained: tuple[Backbone, Adapter],
    monkeypatch: pytest.MonkeyPatch,
    lent: int | None,
    computed: bool,
) -> None:
    backbone, adapter = trained
    again: list[Tensor] = []
    linear = torch.nn.functional.linear

    def noting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        again.append(weight)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    in_backward: set[Tensor] = set()
    last = ""

    def watch(batch: MicroBatch, lent: dict[int, Tensor]) -> None:
        nonlocal last
        unit = batch.next_unit(WINDOW, 1)
        assert unit is not None
        if last == unit.kind == "backward":
            in_backward.update(again)
        again.clear()
        last = unit.kind

    in_units(backbone, adapter, len(backbone.layers) if lent is None else lent, watch)
    frozen = {weight for weight in in_backward if not weight.requires_grad}
    assert any(weight.requires_grad for weight in in_backward), "the adapter's A are computed again"
    assert bool(frozen) == computed


def test_what_was_swapped_out_goes_on_without(trained: tuple[Backbone, Adapter]) -> None:
    def swap(batch: MicroBatch, lent: dict[int, Tensor]) -> None:
        unit = batch.next_unit(WINDOW, 1)
        if unit is not None and unit.kind == "backward" and lent:
            others = sorted(set(range(POOL)) - {slot for slots in lent.values() for slot in slots.tolist()})
            batch.swap_out()
            lent.clear()
            batch.swap_in(torch.tensor(others[-batch.slots :]))

    backbone, adapter = trained
    loss, wanted = in_units(backbone, adapter, 0, calm)
    other, gradients = in_units(backbone, adapter, len(backbone.layers), swap)
    assert other == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
