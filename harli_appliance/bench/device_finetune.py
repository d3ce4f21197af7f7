"""Finetuning in work units on a device: tokens a second, the time of each kind of unit, how soon a reclaim takes
effect, and what units allocate.

The units are the appliance's own; slots are rows of buffers made here, all of which belong to the one micro-batch.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from harli_appliance.bench.device_model import DeviceModel
from harli_appliance.bench.device_rig import Place, Rig
from harli_appliance.bench.device_shapes import Shapes
from harli_appliance.training.activations import footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.job_run import loss_tokens
from harli_appliance.training.objectives import Likelihood
from harli_appliance.training.packing import EncodedExample, pack
from harli_appliance.training.units import MicroBatch

RANK = 16
MICRO_BATCHES = 3
RECLAIMS = 10
MIB = 1 << 20


class Finetuning:
    """One packed sequence of random tokens, trained on again and again at one place."""

    def __init__(self, rig: Rig, model: DeviceModel, shapes: Shapes, place: Place) -> None:
        self._rig, self._model, self._shapes, self._place = rig, model, shapes, place
        backbone = model.backbone
        self._adapter = Adapter(backbone, rank=RANK, alpha=RANK, seed=0)
        chance = random.Random(5)
        example = EncodedExample(
            tuple(chance.randrange(shapes.vocabulary) for _ in range(shapes.sequence)),
            (False,) + (True,) * (shapes.sequence - 1),
        )
        (self._sequence,) = pack([example], shapes.sequence)
        self._slots = footprint(backbone, shapes.sequence).slots
        layers = range(shapes.layers)

        def rows() -> list[torch.Tensor]:
            size = (self._slots, backbone.kv_width)
            return [torch.zeros(size, device=rig.device, dtype=rig.dtype) for _ in layers]

        self._buffers = (rows(), rows())
        self.gradients = [[torch.zeros_like(p) for p in self._adapter.parameters(layer)] for layer in layers]

    def close(self) -> None:
        """Take the adapter off the model."""
        self._adapter.detach()

    def train(self) -> None:
        """Run one micro-batch, whose gradients are added to `gradients`, a list for each layer."""
        self._micro_batch(defaultdict(list))

    def measure(self, matmul_rate: float) -> dict[str, Any]:
        """Everything that this module tells.

        Args:
            matmul_rate: FLOP/s of a large product at this place; a token is counted as 6 FLOPs a parameter.
        """
        self.train()  # warm-up: what is allocated once is allocated here
        took: dict[str, list[float]] = defaultdict(list)
        mark = self._memory_mark()
        began = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            self._micro_batch(took)
        seconds = time.perf_counter() - began
        grown = self._memory_since(mark)
        rate = MICRO_BATCHES * self._shapes.sequence / seconds
        waits = [self._reclaim(seconds / MICRO_BATCHES, attempt) for attempt in range(RECLAIMS)]
        width = 2 * self._shapes.layers * self._model.backbone.kv_width * self._rig.dtype.itemsize
        return {
            "tokens_per_s": round(rate, 2),
            "of_matmul_rate": round(6 * self._model.parameters * rate / matmul_rate, 4),
            "unit_ms": {kind: round(1e3 * statistics.mean(times), 3) for kind, times in took.items()},
            "slowest_unit_ms": round(1e3 * max(max(times) for times in took.values()), 3),
            "reclaim_median_ms": round(1e3 * statistics.median(waits), 3),
            "reclaim_slowest_ms": round(1e3 * max(waits), 3),
            "leased_mib": round(self._slots * width / MIB, 2),
            **grown,
        }

    def _reclaim(self, micro_batch_s: float, attempt: int) -> float:
        """Seconds from asking for the slots, somewhere in a micro-batch, to the last unit's end on the device."""
        asked = threading.Event()
        at = 0.0

        def ask() -> None:
            nonlocal at
            at = time.perf_counter()
            asked.set()

        timer = threading.Timer(micro_batch_s * (attempt + 0.5) / RECLAIMS, ask)
        timer.start()
        while not asked.is_set():
            self._micro_batch(defaultdict(list), asked.is_set)
        return time.perf_counter() - at

    def _micro_batch(self, took: dict[str, list[float]], dropped: Callable[[], bool] = lambda: False) -> None:
        """Run its units and wait for each, until the end or until it is `dropped`."""
        batch = MicroBatch(
            self._model.backbone,
            self._adapter,
            self._sequence,
            buffers=self._buffers,
            slots=torch.arange(self._slots, device=self._rig.device),
            objective=Likelihood(float(self._shapes.sequence - 1)),
            loss_tokens=loss_tokens(self._shapes.window),
            dropout_key=0,
            gradients=self.gradients.__getitem__,
        )
        while (unit := batch.next_unit(self._shapes.window, layers=1)) is not None and not dropped():
            took[unit.kind].append(self._rig.once(self._place, unit.run))

    def _memory_mark(self) -> tuple[int, int]:
        if self._rig.device.type != "cuda":
            return 0, 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.memory_stats()["num_device_alloc"]

    def _memory_since(self, mark: tuple[int, int]) -> dict[str, float]:
        """What units took beside leased rows, and how often the driver was asked for memory; GPU only."""
        if self._rig.device.type != "cuda":
            return {}
        return {
            "workspace_mib": round((torch.cuda.max_memory_allocated() - mark[0]) / MIB, 1),
            "device_allocations": torch.cuda.memory_stats()["num_device_alloc"] - mark[1],
        }
