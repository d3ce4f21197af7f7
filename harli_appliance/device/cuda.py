"""The lanes of an NVIDIA GPU: streams on disjoint SM partitions, and on the whole device.

Every way to split is built once, at start; moving a lane to another one is choosing another stream. Knows torch's
streams and events; does not know what runs on them, nor which split is best.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from harli_appliance.device.driver import CudaDriver, Driver, Sms
from harli_appliance.device.gpu import FALLBACK, Gpu, partition_obstacle
from harli_appliance.device.sizes import split_sizes
from harli_appliance.errors import PartitionsUnavailable
from harli_appliance.scheduling.types import Decision, Split, most_even

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Side:
    """One lane's part of a split: its green context, and a stream of that context."""

    context: Any
    address: int
    stream: Any


class CudaPartitions:
    """Every split of the device that is offered, each a pair of streams on disjoint SMs.

    Args:
        driver: makes green contexts.
        wrap: a stream's address as the stream object that work is launched with.

    Raises:
        PartitionsUnavailable: the driver makes none; what was made before is destroyed.
    """

    def __init__(self, driver: Driver, wrap: Callable[[int], Any]) -> None:
        self._driver = driver
        self._wrap = wrap
        self._pairs: dict[Split, tuple[_Side, _Side]] = {}
        device = driver.device()
        refusal: PartitionsUnavailable | None = None
        for size in split_sizes(device):
            try:
                self._add(device, size)
            except PartitionsUnavailable as error:  # not every size exists on every GPU
                refusal = error
        if not self._pairs:
            raise refusal or PartitionsUnavailable(f"{device.count} SMs are too few to split; {FALLBACK}")

    @property
    def splits(self) -> tuple[Split, ...]:
        """Ascending by what the inference lane has."""
        return tuple(self._pairs)

    @property
    def even(self) -> Split:
        """The split nearest to half each."""
        return most_even(self._pairs)

    def streams(self, split: Split) -> tuple[Any, Any]:
        """The inference and the training lane's stream."""
        inference, training = self._pairs[split]
        return inference.stream, training.stream

    def close(self) -> None:
        """Destroy streams, then contexts; nothing may run on them any more."""
        while self._pairs:
            _, sides = self._pairs.popitem()
            for side in sides:
                self._destroy(side)

    def _add(self, device: Sms, size: int) -> None:
        group, rest = self._driver.split(device, size)
        if group.count + rest.count != device.count:
            raise PartitionsUnavailable(
                f"a split of {device.count} SMs gives {group.count} and {rest.count}; {FALLBACK}"
            )
        split = Split(f"{group.count}+{rest.count}", group.count / device.count, rest.count / device.count)
        if split in self._pairs:  # the driver rounded up to a size that is there
            return
        inference = self._side(group)
        try:
            self._pairs[split] = (inference, self._side(rest))
        except PartitionsUnavailable:
            self._destroy(inference)
            raise

    def _side(self, sms: Sms) -> _Side:
        context = self._driver.create(sms)
        try:
            if (count := self._driver.sms_of(context)) != sms.count:
                raise PartitionsUnavailable(
                    f"a partition of {sms.count} SMs came out with {count}; {FALLBACK}"
                )
            address = self._driver.stream(context)
        except PartitionsUnavailable:
            self._driver.destroy(context)
            raise
        return _Side(context, address, self._wrap(address))

    def _destroy(self, side: _Side) -> None:
        self._driver.destroy_stream(side.address)
        self._driver.destroy(side.context)


class LaneStream:
    """Where a lane's work goes on the GPU, and the waiting for it.

    Args:
        stream: the stream to begin with.
        ahead: pieces of work that may be queued on the GPU while the lane's thread goes on: 0 waits for each, 1
            launches the next piece while one runs, so that the GPU does not wait for the host.
        cuda: the module ``torch.cuda``.
    """

    def __init__(self, stream: Any, *, ahead: int = 0, cuda: Any = torch.cuda) -> None:
        self._stream = stream
        self._ahead = ahead
        self._cuda = cuda
        self._queued: deque[Any] = deque()
        self._ran_on: Any = stream
        self._lock = threading.Lock()

    def use(self, stream: Any) -> None:
        """Launch on `stream` from the next piece of work on. From any thread."""
        with self._lock:
            self._stream = stream

    @contextmanager
    def around(self) -> Iterator[None]:
        """Run a piece of work on the lane's thread. Left when all but the last `ahead` pieces are done.

        Waiting is for a blocking event: the thread sleeps in the driver, without the interpreter's lock.
        """
        with self._lock:
            stream = self._stream
        if stream is not self._ran_on and self._queued:
            stream.wait_event(self._queued[-1])  # pieces of a lane keep their order, also across partitions
        self._ran_on = stream
        ahead = 0
        try:
            with self._cuda.stream(stream):
                yield
            ahead = self._ahead
        finally:
            event = self._cuda.Event(blocking=True)
            event.record(stream)
            self._queued.append(event)
            self._wait(ahead)

    def works(self) -> bool:
        """Whether the device still has something to do of what was launched. From any thread."""
        try:
            return not self._queued[-1].query()
        except IndexError:  # the lane's thread has just waited for the last one
            return False

    def drain(self) -> None:
        """Wait for everything that was launched. On the lane's thread."""
        self._wait(0)

    def _wait(self, ahead: int) -> None:
        while len(self._queued) > ahead:
            self._queued.popleft().synchronize()


class CudaLanes:
    """Both lanes' streams, arranged as each decision says.

    Args:
        partitions: None where the GPU cannot be split.
    """

    def __init__(self, partitions: CudaPartitions | None, cuda: Any = torch.cuda) -> None:
        self._partitions = partitions
        self._whole = (cuda.Stream(), cuda.Stream())
        self.split: Split | None = None
        """The split in force; None while each lane has the whole device."""
        self.inference = LaneStream(self._whole[0], cuda=cuda)
        self.training = LaneStream(self._whole[1], ahead=1, cuda=cuda)

    @property
    def splits(self) -> Sequence[Split]:
        return self._partitions.splits if self._partitions is not None else ()

    @property
    def inference_streams(self) -> list[Any]:
        """Of the inference lane on each split."""
        return [self._partitions.streams(split)[0] for split in self.splits] if self._partitions else []

    def arrange(self, decision: Decision) -> None:
        """Put the lanes where `decision` wants them: on its split when both run, else on the whole device.

        A unit that is still running finishes where it is.
        """
        streams, self.split = self._whole, None
        if decision.mode == "partition" and self._partitions is not None:
            self.split = decision.split or self._partitions.even
            streams = self._partitions.streams(self.split)
        self.inference.use(streams[0])
        self.training.use(streams[1])

    def training_places(self) -> Iterator[Split | None]:
        """Put the training lane on each stream that it may ever run on, one after the other; None is all SMs."""
        for split in (None, *self.splits):
            self.training.use(
                self._whole[1]
                if split is None or self._partitions is None
                else self._partitions.streams(split)[1]
            )
            yield split
        self.training.use(self._whole[1])

    def close(self) -> None:
        """Destroy the partitions; both lanes have been drained."""
        if self._partitions is not None:
            self._partitions.close()


def cuda_lanes(gpu: Gpu) -> CudaLanes:
    """Lanes on torch's first GPU, with partitions where driver and device have them; why not is logged."""
    torch.zeros(1, device="cuda")  # green contexts are made beside the primary context, which must exist
    obstacle = partition_obstacle(gpu)
    partitions = None
    if obstacle is None:
        try:
            partitions = CudaPartitions(
                CudaDriver(),
                lambda address: torch.cuda.ExternalStream(address, device="cuda:0"),  # type: ignore[no-untyped-call]
            )
        except PartitionsUnavailable as error:
            obstacle = error.message
    if obstacle is not None:
        log.warning("no SM partitions", why=obstacle)
    return CudaLanes(partitions)
