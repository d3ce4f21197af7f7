"""Stand-ins for the CUDA driver and for torch.cuda, strict about what the real ones leave undefined."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any


@dataclass
class Resource:
    """A set of SMs, as `cuda.bindings.driver.CUdevResource` describes it."""

    sms: frozenset[int]
    split: int
    least: int
    multiple: int

    @property
    def sm(self) -> SimpleNamespace:
        return SimpleNamespace(
            smCount=len(self.sms), minSmPartitionSize=self.least, smCoscheduledAlignment=self.multiple
        )


@dataclass
class Context:
    sms: frozenset[int]
    split: int
    streams: set[int] = field(default_factory=set)
    alive: bool = True


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 914


class FakeBindings:
    """The module `cuda.bindings.driver` over a device of `sms` SMs, answering (status, *values) as it does.

    Attributes:
        fails: function name to the calls after which it fails, e.g. {"cuGreenCtxCreate": 3}.
        tells: 1 where resources say how they can be split (CUDA 13); older drivers leave in these fields what was
            there.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75)

    def __init__(self, sms: int = 132, *, major: int = 9, tells: int = 1) -> None:
        self.least, self.multiple = {9: (8, 8), 8: (4, 2)}[major]
        self.major = major
        self.tells = tells
        self.total = frozenset(range(sms))
        self.contexts: list[Context] = []
        self.streams: dict[int, Context] = {}
        self.fails: dict[str, int] = {}
        self.calls: list[str] = []
        self._splits = 0

    def CUstream(self, address: int) -> int:
        return address

    def _called(self, name: str) -> Status:
        self.calls.append(name)
        limit = self.fails.get(name)
        if limit is not None and self.calls.count(name) > limit:
            return Status.CUDA_ERROR_NOT_SUPPORTED
        return Status.CUDA_SUCCESS

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (self._called("cuInit"),)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return self._called("cuDeviceGet"), ordinal

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        return self._called("cuDeviceGetAttribute"), self.major

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[Any, ...]:
        return self._called("cuDeviceGetDevResource"), self._resource(self.total, 0)

    def cuDevSmResourceSplitByCount(
        self, groups: int, source: Resource, flags: int, count: int
    ) -> tuple[Any, ...]:
        assert (groups, flags) == (1, 0)
        status = self._called("cuDevSmResourceSplitByCount")
        size = max(self.least, -(-count // self.multiple) * self.multiple)
        if status == 0 and size > len(source.sms):
            status = Status.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION
        self._splits += 1
        ordered = sorted(source.sms)
        group = self._resource(frozenset(ordered[:size]), self._splits)
        return status, [group], 1, self._resource(frozenset(ordered[size:]), self._splits)

    def cuDevResourceGenerateDesc(self, resources: list[Resource], count: int) -> tuple[Any, ...]:
        assert count == len(resources) == 1
        return self._called("cuDevResourceGenerateDesc"), resources[0]

    def cuGreenCtxCreate(self, description: Resource, device: int, flags: int) -> tuple[Any, ...]:
        assert flags == 1  # CU_GREEN_CTX_DEFAULT_STREAM is required
        status = self._called("cuGreenCtxCreate")
        context = Context(description.sms, description.split)
        if status == 0:
            self.contexts.append(context)
        return status, context

    def cuGreenCtxGetDevResource(self, context: Context, kind: int) -> tuple[Any, ...]:
        return self._called("cuGreenCtxGetDevResource"), self._resource(context.sms, context.split)

    def cuGreenCtxStreamCreate(self, context: Context, flags: int, priority: int) -> tuple[Any, ...]:
        assert flags == 1  # CU_STREAM_NON_BLOCKING is required
        status = self._called("cuGreenCtxStreamCreate")
        address = 0x1000 + len(self.streams)
        if status == 0:
            self.streams[address] = context
            context.streams.add(address)
        return status, address

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams[stream].streams.remove(stream)
        return (self._called("cuStreamDestroy"),)

    def cuGreenCtxDestroy(self, context: Context) -> tuple[Any, ...]:
        assert context.alive, "destroyed twice"
        assert not context.streams, "destroyed under its streams"
        context.alive = False
        return (self._called("cuGreenCtxDestroy"),)

    @property
    def living(self) -> list[Context]:
        return [context for context in self.contexts if context.alive]

    def _resource(self, sms: frozenset[int], split: int) -> Resource:
        return Resource(sms, split, self.least * self.tells, self.multiple * self.tells)


class FakeStream:
    def __init__(self, name: str = "") -> None:
        self.name = name
        self.waited: list[FakeEvent] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.waited.append(event)


class FakeEvent:
    """Done when the test says so; whoever waits before that sleeps."""

    def __init__(self, *, blocking: bool) -> None:
        assert blocking, "waiting would keep a core busy"
        self.stream: FakeStream | None = None
        self.done = threading.Event()

    def record(self, stream: FakeStream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.done.wait(10)

    def query(self) -> bool:
        return self.done.is_set()


class FakeCuda:
    """As much of `torch.cuda` as lanes use.

    Args:
        at_once: events are done as soon as they are recorded.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self.current: FakeStream | None = None
        self.events: list[FakeEvent] = []
        self._at_once = at_once

    def Stream(self) -> FakeStream:
        return FakeStream("whole")

    def Event(self, *, blocking: bool) -> FakeEvent:
        event = FakeEvent(blocking=blocking)
        if self._at_once:
            event.done.set()
        self.events.append(event)
        return event

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
