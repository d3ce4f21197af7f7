"""Places on a device where work can be timed, alone and two at once: cores of a CPU, streams of a GPU.

Knows how to launch and time; does not know what the work is.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from harli_appliance.device.cuda import CudaPartitions
from harli_appliance.device.driver import CudaDriver
from harli_appliance.device.partition import Partition
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import PartitionsUnavailable

Work = Callable[[], object]
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where work runs: a pinned lane or a stream."""

    name: str
    where: Any
    share: float
    """Of the device's compute."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to split the device."""

    name: str
    inference: Place
    training: Place


class Rig(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def whole(self) -> Place: ...
    @property
    def ways(self) -> Sequence[Way]: ...
    @property
    def unsplit(self) -> Way | None:
        """Both lanes on the whole device at once, where that can be."""
        ...

    def alone(self, place: Place, work: Work, times: int) -> float:
        """Mean seconds of one call, after a warm-up."""
        ...

    def together(
        self, place: Place, work: Work, times: int, beside: Place, other: Work
    ) -> tuple[float, float]:
        """Mean seconds of `times` calls of `work` at `place`, and of `other` repeated at `beside` meanwhile."""
        ...

    def once(self, place: Place, work: Work) -> float:
        """Seconds of one call, the launching included, without a warm-up."""
        ...

    def close(self) -> None: ...


class CpuRig:
    """Lanes pinned to the cores of a partition; torch computes on one thread in each."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, partition: Partition) -> None:
        self._lanes = (Lane("inference", partition.inference), Lane("training", partition.training))
        share = partition.inference_share
        inference = Place("inference", self._lanes[0], share)
        training = Place("training", self._lanes[1], 1 - share)
        self.whole = inference
        self.ways = (Way("lanes", inference, training),)
        self.unsplit: Way | None = None
        torch.set_num_threads(1)

    def alone(self, place: Place, work: Work, times: int) -> float:
        return float(place.where.submit(_mean_s, work, times).result())

    def together(
        self, place: Place, work: Work, times: int, beside: Place, other: Work
    ) -> tuple[float, float]:
        over = threading.Event()
        started = threading.Event()

        def repeat() -> float:
            took = []
            while not over.is_set():
                began = time.perf_counter()
                other()
                took.append(time.perf_counter() - began)
                started.set()
            return statistics.mean(took)

        running = beside.where.submit(repeat)
        started.wait()
        try:
            mine = self.alone(place, work, times)
        finally:
            over.set()
        return mine, float(running.result())

    def once(self, place: Place, work: Work) -> float:
        return float(place.where.submit(_mean_s, work, 1, 0).result())

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()


def _mean_s(work: Work, times: int, warm_up: int = WARM_UP) -> float:
    for _ in range(warm_up):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


class CudaRig:
    """Streams of SM partitions, timed with events on the device.

    Attributes:
        partitions: None where the GPU cannot be split; `ways` is then empty.
        refusal: why not.
    """

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.zeros(1, device=self.device)
        self.partitions: CudaPartitions | None = None
        self.refusal: str | None = None
        self.whole = Place("whole device", torch.cuda.Stream(), 1.0)  # type: ignore[no-untyped-call]
        other = Place("whole device again", torch.cuda.Stream(), 1.0)  # type: ignore[no-untyped-call]
        self.unsplit: Way | None = Way("no partitions", self.whole, other)
        try:
            self.partitions = CudaPartitions(
                CudaDriver(),
                lambda address: torch.cuda.ExternalStream(address, device=self.device),  # type: ignore[no-untyped-call]
            )
        except PartitionsUnavailable as error:
            self.refusal = error.message
        self.ways = tuple(self._ways())

    def _ways(self) -> Iterator[Way]:
        if self.partitions is not None:
            for split in self.partitions.splits:
                inference, training = self.partitions.streams(split)
                yield Way(
                    split.name,
                    Place(f"{split.name} inference", inference, split.inference),
                    Place(f"{split.name} training", training, split.training),
                )

    def alone(self, place: Place, work: Work, times: int) -> float:
        torch.cuda.synchronize()  # what the work reads may have been made on another stream
        with self.on(place):
            for _ in range(WARM_UP):
                work()
        place.where.synchronize()
        with self.on(place):
            first, last = _event(), _event()
            first.record()
            for _ in range(times):
                work()
            last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / times

    def together(
        self, place: Place, work: Work, times: int, beside: Place, other: Work
    ) -> tuple[float, float]:
        """The other side is queued to outlast this one; only its calls that lie within are counted."""
        mine, theirs = self.alone(place, work, 3), self.alone(beside, other, 3)
        calls = max(4, int(1.8 * times * mine / theirs) + 4)
        marks = [_event() for _ in range(calls + 1)]
        torch.cuda.synchronize()
        with self.on(beside):
            marks[0].record()
            self._queue(other, marks[1:4])
        with self.on(place):
            first, last = _event(), _event()
            first.record()
            for _ in range(times):
                work()
            last.record()
        with self.on(beside):
            self._queue(other, marks[4:])
        torch.cuda.synchronize()
        begun, ended = marks[0].elapsed_time(first), marks[0].elapsed_time(last)
        at = [marks[0].elapsed_time(mark) for mark in marks]
        within = [b - a for a, b in pairwise(at) if a >= begun and b <= ended]
        if not within:
            raise RuntimeError("no call of the other side lay within; nothing ran beside")
        return (ended - begun) / 1e3 / times, statistics.mean(within) / 1e3

    def once(self, place: Place, work: Work) -> float:
        began = time.perf_counter()
        with self.on(place):
            work()
        place.where.synchronize()
        return time.perf_counter() - began

    @contextmanager
    def on(self, place: Place) -> Iterator[None]:
        with torch.cuda.stream(place.where):
            yield

    def close(self) -> None:
        torch.cuda.synchronize()
        if self.partitions is not None:
            self.partitions.close()

    def _queue(self, work: Work, marks: Sequence[Any]) -> None:
        for mark in marks:
            work()
            mark.record()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
