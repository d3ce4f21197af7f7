"""The GPU rig of `harli bench device` on simulated streams: what it makes of times, and which stream gets what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from harli_appliance.bench import device_rig
from harli_appliance.bench.device_rig import CudaRig
from harli_appliance.device.driver import CudaDriver
from tests.fake_cuda import FakeBindings


class SimStream:
    """A stream with a clock of its own, in seconds."""

    every: list[SimStream] = []  # noqa: RUF012 - emptied by the fixture
    current: SimStream

    def __init__(self, address: int = 0, device: object = None) -> None:
        self.address = address
        self.now = 0.0
        self.calls = 0
        SimStream.every.append(self)

    def synchronize(self) -> None:
        return None


class SimEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self, stream: SimStream | None = None) -> None:
        self.at = (stream or SimStream.current).now

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: SimEvent) -> float:
        return 1e3 * (other.at - self.at)


def work(seconds: float) -> Callable[[], None]:
    """A kernel that takes so long on whatever stream is current."""

    def launch() -> None:
        SimStream.current.now += seconds
        SimStream.current.calls += 1

    return launch


@contextmanager
def on(stream: SimStream) -> Iterator[None]:
    SimStream.current = stream
    yield


def synchronize() -> None:
    latest = max(stream.now for stream in SimStream.every)
    for stream in SimStream.every:
        stream.now = latest


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[CudaRig, FakeBindings]]:
    api = FakeBindings()
    SimStream.every = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    for name, fake in {
        "Stream": SimStream,
        "ExternalStream": SimStream,
        "Event": SimEvent,
        "stream": on,
        "synchronize": synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device_rig, "CudaDriver", lambda: CudaDriver(api=api))
    made = CudaRig()
    yield made, api
    made.close()
    assert not api.living


def test_ways_are_the_splits_and_their_streams(rig: tuple[CudaRig, FakeBindings]) -> None:
    made, api = rig
    assert made.ways[0].name == "16+116"
    for way in made.ways:
        sides = [api.streams[place.where.address].sms for place in (way.inference, way.training)]
        assert not sides[0] & sides[1]
        assert way.inference.share == len(sides[0]) / 132


def test_alone_is_the_mean_of_what_ran_on_that_stream(rig: tuple[CudaRig, FakeBindings]) -> None:
    made, _ = rig
    place = made.ways[0].training
    assert made.alone(place, work(0.002), 10) == pytest.approx(0.002)
    assert [stream.calls for stream in SimStream.every if stream.calls] == [12]
    assert place.where.calls == 12


def test_together_counts_what_lay_within(rig: tuple[CudaRig, FakeBindings]) -> None:
    made, _ = rig
    way = made.ways[0]
    mine, theirs = made.together(way.inference, work(0.002), 20, way.training, work(0.005))
    assert (mine, theirs) == (pytest.approx(0.002), pytest.approx(0.005))
    mine, theirs = made.together(way.inference, work(0.010), 5, way.training, work(0.0001))
    assert (mine, theirs) == (pytest.approx(0.010), pytest.approx(0.0001))


def test_nothing_beside_is_an_error_and_not_a_number(rig: tuple[CudaRig, FakeBindings]) -> None:
    made, _ = rig
    way = made.ways[0]
    with pytest.raises(RuntimeError, match="nothing ran beside"):
        made.together(way.inference, work(0.001), 1, way.training, work(1.0))


def test_a_gpu_that_cannot_be_split_has_no_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeBindings()
    api.fails["cuInit"] = 0
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "Stream", SimStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(device_rig, "CudaDriver", lambda: CudaDriver(api=api))
    made = CudaRig()
    assert made.ways == ()
    assert "cuInit" in (made.refusal or "")
    made.close()
