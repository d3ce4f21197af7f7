"""The pace of training at each place: told by whole micro-batches, whatever units made them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from harli_appliance.scheduling.types import Split
from harli_appliance.training.activations import footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.objectives import Likelihood, Objective, Preference
from harli_appliance.training.pace import Pace
from harli_appliance.training.packing import EncodedExample, pack
from harli_appliance.training.units import MicroBatch

WIDE, NARROW = Split("wide", 0.3, 0.7), Split("narrow", 0.7, 0.3)


def test_a_place_is_told_of_once_it_did_as_much_as_a_micro_batch() -> None:
    told: list[tuple[float, float, Split | None]] = []
    pace = Pace(lambda *found: told.append(found))
    pace.ran(40.0, 1.0, WIDE)
    pace.ran(0.0, 0.5, WIDE)  # a loss unit
    pace.ran(24.0, 3.0, NARROW)
    pace.ended(64)
    assert told == []
    pace.ran(24.0, 0.5, WIDE)
    pace.ran(39.0, 2.0, NARROW)
    pace.ended(64)
    assert told == [(64.0, 2.0, WIDE)]
    pace.ran(1.0, 1.0, NARROW)
    pace.ran(64.0, 4.0, None)
    pace.ended(64)
    assert told[1:] == [(64.0, 6.0, NARROW), (64.0, 4.0, None)]
    pace.ended(64)
    assert len(told) == 3


@pytest.mark.parametrize("window", [5, 16, 64])
@pytest.mark.parametrize("objective", [Likelihood(37), Preference(0.1, 1)])
def test_the_work_of_a_micro_batch_is_its_tokens(reference: Any, window: int, objective: Objective) -> None:
    """Computing the base model's view is no work for training, it only takes time."""
    backbone = Backbone(copy.deepcopy(reference).requires_grad_(False))
    adapter = Adapter(backbone, rank=2, alpha=4, seed=0)
    examples = [EncodedExample(tuple(range(6, 6 + count)), (True,) * count) for count in (17, 20)]
    (sequence,) = pack(examples, 37)
    slots = footprint(backbone, 37).slots
    made = [[torch.zeros(slots, backbone.kv_width) for _ in backbone.layers] for _ in "kv"]
    totals = [
        [torch.zeros_like(p) for p in adapter.parameters(layer)] for layer in range(len(backbone.layers))
    ]
    batch = MicroBatch(
        backbone,
        adapter,
        sequence,
        buffers=(made[0], made[1]),
        slots=torch.arange(slots),
        objective=objective,
        loss_tokens=8,
        dropout_key=None,
        gradients=lambda layer: totals[layer],
    )
    seen = [0.0]
    while (unit := batch.next_unit(window, layers=1)) is not None:
        unit.run()
        seen.append(batch.worked)
    assert seen == sorted(seen)
    assert batch.worked == pytest.approx(37.0)
