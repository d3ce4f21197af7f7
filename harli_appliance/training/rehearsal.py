"""Optimizer steps of the largest usual size, made for nothing: what training allocates for itself is allocated by
them.

torch's allocator keeps what was freed for the stream that it was allocated on. After a rehearsal on every stream
that training may use, units and optimizer steps find their workspace there, and the driver is not asked for memory
while requests are served. Knows runs; does not know streams.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from harli_appliance.api.ports import Job
from harli_appliance.training.activations import Buffers
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.job_run import JobRun, RunOptions
from harli_appliance.training.packing import EncodedExample

NOWHERE = Path("/nonexistent")
"""Where a rehearsal's checkpoints would be: it has none to go on from, and makes none."""


class Rehearsal:
    """A job of one example that learns nothing, on the backbone until `close`.

    Args:
        rank: of the adapter: the largest that jobs may ask for.
        options: of jobs; the example is `sequence_tokens` long.
        leasable: slots that can be leased at most.
        times: how often it will be made.

    Raises:
        JobFailed: state and micro-batch do not fit the slots that can be leased.
    """

    def __init__(
        self,
        backbone: Backbone,
        buffers: Buffers,
        *,
        rank: int,
        options: RunOptions,
        leasable: int,
        times: int,
    ) -> None:
        job = Job(
            id="rehearsal",
            status="running",
            model="",
            training_file="",
            created_at=0,
            seed=0,
            n_epochs=times,
            batch_size=1,
            learning_rate=0.0,
            lora_rank=rank,
            lora_alpha=rank,
        )
        tokens = options.sequence_tokens
        example = EncodedExample((0,) * tokens, (False,) + (True,) * (tokens - 1))
        self._run = JobRun(job, [example], backbone, buffers, replace(options, checkpoints=NOWHERE), leasable)

    @property
    def state_slots(self) -> int:
        """Consecutive slots that it is to be lent for the adapter's state."""
        return self._run.state.slots

    @property
    def slots(self) -> int:
        """Slots that it is to be lent for the micro-batch."""
        return self._run.slots_of(0)

    def place(self, slots: Tensor) -> None:
        """Put the adapter's state into `state_slots` slots, before anything is made."""
        self._run.state.place(slots)

    def make(self, slots: Tensor) -> None:
        """A micro-batch and the optimizer's step; the rows of `slots` are written.

        Raises:
            JobFailed: the model's loss or gradients are no numbers.
        """
        batch = self._run.begin(0, slots)
        while (unit := batch.next_unit(self._run.window_tokens, layers=1)) is not None:
            unit.run()
        self._run.finish(0, batch)
        self._run.end_round()

    def close(self) -> None:
        """Take the adapter off the backbone."""
        self._run.close()
