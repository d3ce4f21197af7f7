"""A rehearsal allocates what units need and leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from harli_appliance.training.backbone import Backbone
from harli_appliance.training.rehearsal import rehearsal_slots, rehearse
from harli_appliance.training.units import MicroBatch


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

    monkeypatch.setattr(MicroBatch, "next_unit", noted)
    model = copy.deepcopy(reference).to(dtype)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    backbone = Backbone(model)
    count = rehearsal_slots(backbone, 48)
    buffers = tuple(
        [torch.zeros(count + 10, backbone.kv_width, dtype=dtype) for _ in backbone.layers] for _ in range(2)
    )
    slots = torch.arange(count) + 5
    rehearse(backbone, (buffers[0], buffers[1]), slots, rank=4, sequence_tokens=48, window_tokens=16)
    layers = len(backbone.layers)
    assert [kinds.count(kind) for kind in ("forward", "loss", "backward")] == [
        3 * layers,
        3,
        3 * layers + layers - 1,  # K and V of all layers but the last are computed again
    ]
    for buffer in [*buffers[0], *buffers[1]]:
        assert not buffer[:5].any()
        assert not buffer[5 + count :].any()
    assert buffers[0][0].any()
    after = model.state_dict()
    assert after.keys() == weights.keys(), "the adapter is off the model"
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
