"""What training holds between two units lies in SGLang's KV buffers: the process is asked, not the code.

Two measures. Every tensor that Python knows of is looked up by its storage; and torch's own allocator is asked how
many bytes were allocated and not freed since before the job began, which also sees what only C++ holds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harli_appliance.memory.pool import Lease, SlotPool
from harli_appliance.runtime.text import TextCodec
from harli_appliance.runtime.weights import shared_model
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.job_run import JobRun, RunOptions
from tests.conftest import Serving
from tests.encoding import encoded
from tests.test_coserving import a_job, lesson  # noqa: F401  a fixture


def tensors() -> dict[int, Tensor]:
    """Every tensor that Python knows of, one for each storage."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {
        tensor.untyped_storage().data_ptr(): tensor
        for tensor in found
        if tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes()
    }


class Job:
    """A job on SGLang's own slots, driven by hand."""

    def __init__(self, serving: Serving, data: Path, home: Path) -> None:
        self.buffers = (serving.slots.k_buffers, serving.slots.v_buffers)
        self._pool = SlotPool(serving.slots, watermark=0.0)
        backbone = Backbone(shared_model(serving.runtime.model, serving.folder))
        options = RunOptions(16, 64, 3, 2, home)
        self.known = set(tensors())
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()
        self.run = JobRun(
            a_job(dropout=0.1),
            encoded(data, TextCodec(serving.folder)),
            backbone,
            self.buffers,
            options,
            self._pool.leasable,
        )
        self._leases: list[Lease] = []
        state = self._pool.grant_contiguous(self.run.state.slots, lambda: None)
        assert state is not None
        self._leases.append(state)
        self.run.state.place(state.indices)

    def steps(self) -> Iterator[str]:
        """Train; says between any two units what has just ended."""
        for _ in range(2):
            for index in range(self.run.micro_batches()):
                lease = self._pool.grant(self.run.slots_of(index), lambda: None)
                assert lease is not None
                self._leases.append(lease)
                batch = self.run.begin(index, lease.indices)
                while (unit := batch.next_unit(self.run.window_tokens, 1)) is not None:
                    unit.run()
                    yield unit.kind
                self.run.finish(index, batch)
                self._leases.pop().release()
            self.run.optimizer_step()
            yield "step"

    def outside(self) -> list[Tensor]:
        """Tensors that came into being with the job and do not lie in the KV buffers."""
        inside = {buffer.untyped_storage().data_ptr() for group in self.buffers for buffer in group}
        return [tensor for at, tensor in tensors().items() if at not in self.known | inside]

    def allocated(self) -> int:
        """Bytes that torch's allocator gave out since the job began and that were not given back."""
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    @property
    def weights(self) -> int:
        """Bytes of the loss weights of the step's tokens."""
        return sum(sequence.weights.nbytes for sequence in self.run._packs)

    @property
    def numbers(self) -> int:
        """Bytes of the other token data: ids, positions, starts, targets."""
        names = ("tokens", "positions", "starts", "targets")
        return sum(getattr(sequence, name).nbytes for sequence in self.run._packs for name in names)

    @property
    def counters(self) -> int:
        """Bytes of AdamW's step counters."""
        return 4 * len(self.run.adapter.parameters())

    def close(self) -> None:
        self.run.close()
        while self._leases:
            self._leases.pop().release()
        self._pool.settle()


@pytest.mark.parametrize("moment", [("forward", 9), ("loss", 2), ("backward", 21), ("step", 1)])
def test_all_that_training_holds_between_units_lies_in_the_pool(
    serving: Serving,
    lesson: Path,
    tmp_path: Path,
    moment: tuple[str, int],
) -> None:
    kind, times = moment

    def scenario() -> None:
        job = Job(serving, lesson, tmp_path)
        try:
            for ended in job.steps():
                seen.append(ended)
                if seen.count(kind) == times:
                    break
            floats = [tensor for tensor in job.outside() if tensor.is_floating_point()]
            assert sum(tensor.untyped_storage().nbytes() for tensor in floats) == job.weights + job.counters
            remainder = job.weights + job.numbers + job.counters
            # The pool's own lists of slot numbers: what is free, and what is leased.
            lists = 2 * 8 * serving.slots.size
            assert remainder <= job.allocated() <= remainder + lists
            assert job.run.state.bytes > 100 * remainder, "nearly everything lies in the pool"
        finally:
            job.close()

    seen: list[str] = []
    serving.lane.submit(scenario).result()
