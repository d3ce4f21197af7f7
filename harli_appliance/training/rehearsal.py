"""A micro-batch of the largest usual size, run for nothing: what units allocate for themselves is allocated by it.

torch's allocator keeps what was freed for the stream that it was allocated on. After a rehearsal on every stream
that training may use, units find their workspace there, and the driver is not asked for memory while requests are
served. Knows units; does not know streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harli_appliance.training.activations import Buffers, footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.job_run import loss_tokens
from harli_appliance.training.objectives import Likelihood
from harli_appliance.training.packing import EncodedExample, pack
from harli_appliance.training.units import MicroBatch


def rehearsal_slots(backbone: Backbone, sequence_tokens: int) -> int:
    """Slots that a rehearsal is lent."""
    return footprint(backbone, sequence_tokens).slots


def rehearse(
    backbone: Backbone,
    buffers: Buffers,
    slots: Tensor,
    *,
    rank: int,
    sequence_tokens: int,
    window_tokens: int,
) -> None:
    """Run every unit of one packed sequence with a new adapter, and forget both.

    Args:
        slots: `rehearsal_slots` of them, whose rows are written.
        rank: of the adapter: the largest that jobs may ask for.
    """
    adapter = Adapter(backbone, rank=rank, alpha=rank, seed=0)
    try:
        example = EncodedExample((0,) * sequence_tokens, (False,) + (True,) * (sequence_tokens - 1))
        (sequence,) = pack([example], sequence_tokens)
        gradients = [
            [torch.zeros_like(parameter) for parameter in adapter.parameters(layer)]
            for layer in range(len(backbone.layers))
        ]
        batch = MicroBatch(
            backbone,
            adapter,
            sequence,
            buffers=buffers,
            slots=slots,
            objective=Likelihood(float(sequence_tokens)),
            loss_tokens=loss_tokens(window_tokens),
            dropout_key=0,
            gradients=gradients.__getitem__,
        )
        while (unit := batch.next_unit(window_tokens, layers=1)) is not None:
            unit.run()
    finally:
        adapter.detach()
