"""The device's gauges and the thread that reads them."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from harli_appliance.api.metrics import exposition
from harli_appliance.device.monitor import Monitor, Reading
from harli_appliance.device.monitor_cpu import CpuGauges
from harli_appliance.device.monitor_gpu import GpuGauges
from harli_appliance.device.partition import Partition
from harli_appliance.schema import HardwareView
from harli_appliance.status_view import hardware_view
from harli_appliance.tui import words
from tests.fake_nvml import FakeNvml
from tests.fakes import make_status

WAIT_S = 10.0


# -- the thread --------------------------------------------------------------------------------------


class Gauges:
    """Readings counted; fails when told to, and lets a test wait for the next one."""

    def __init__(self) -> None:
        self.reads = 0
        self.broken = False
        self.closed = False
        self.thread = ""
        self._changed = threading.Condition()

    def read(self) -> Reading:
        with self._changed:
            self.reads += 1
            self.thread = threading.current_thread().name
            self._changed.notify_all()
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        return Reading(compute=self.reads / 1000)

    def close(self) -> None:
        self.closed = True

    def wait_for(self, more: int) -> None:
        with self._changed:
            wanted = self.reads + more
            assert self._changed.wait_for(lambda: self.reads >= wanted, WAIT_S)


def test_readings_are_taken_on_a_thread_of_their_own() -> None:
    gauges = Gauges()
    monitor = Monitor(lambda: gauges, period_s=0.001)
    gauges.wait_for(3)
    latest = monitor.latest
    assert latest is not None
    assert latest.compute
    assert gauges.thread == "monitor"
    monitor.close()
    assert gauges.closed


def test_a_reading_that_fails_is_unknown_until_one_works_again() -> None:
    gauges = Gauges()
    gauges.broken = True
    monitor = Monitor(lambda: gauges, period_s=0.001)
    gauges.wait_for(3)
    assert monitor.latest is None
    gauges.broken = False
    gauges.wait_for(3)
    assert monitor.latest is not None
    monitor.close()


def test_gauges_that_cannot_be_opened_end_nothing_else() -> None:
    def broken() -> Gauges:
        raise RuntimeError("no NVML")

    monitor = Monitor(broken)
    monitor.close()
    assert monitor.latest is None


# -- a CPU -------------------------------------------------------------------------------------------


def test_cores_are_read_by_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: [100.0, 50.0, 0.0, 20.0])
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    sensors = {"nvme": [SimpleNamespace(current=30.0)], "k10temp": [SimpleNamespace(current=71.5)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    read = CpuGauges(Partition((0, 1), (3,))).read()
    assert (read.inference, read.training) == (0.75, 0.2)
    assert read.compute == pytest.approx(1.7 / 3)
    assert read.temperature_c == 71.5
    assert read.clock_mhz is None
    assert 0 < (read.memory_bytes or 0) < (read.memory_total_bytes or 0)


# -- a GPU -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpm_compares_two_samples_and_frees_them() -> None:
    nvml = FakeNvml()
    gauges = GpuGauges(nvml)
    first = gauges.read()
    assert (first.compute, first.tensor, first.bandwidth) == (None, None, None)
    assert (first.power_w, first.temperature_c, first.clock_mhz) == (350.5, 61.0, 1755.0)
    for _ in range(3):
        read = gauges.read()
    assert (read.compute, read.tensor, read.bandwidth) == (0.8, 0.3, 0.55)
    assert nvml.samples == 1
    gauges.close()
    assert (nvml.samples, nvml.open) == (0, 0)


def test_a_metric_that_gpm_does_not_have_is_unknown() -> None:
    nvml = FakeNvml()
    del nvml.shares[pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL]
    gauges = GpuGauges(nvml)
    gauges.read()
    read = gauges.read()
    assert (read.compute, read.bandwidth) == (0.8, None)


def test_without_gpm_the_share_of_time_with_a_kernel_is_told() -> None:
    for nvml in (FakeNvml(), FakeNvml(lacks="nvmlGpmQueryDeviceSupport")):
        nvml.gpm = False
        gauges = GpuGauges(nvml)
        gauges.read()
        read = gauges.read()
        assert (read.compute, read.tensor, nvml.samples) == (0.99, None, 0)


def test_what_a_gpu_does_not_tell_is_unknown() -> None:
    read = GpuGauges(FakeNvml(lacks="nvmlDeviceGetPowerUsage")).read()
    assert read.power_w is None
    assert read.temperature_c == 61.0


def test_a_failed_sample_is_freed() -> None:
    nvml = FakeNvml(lacks="nvmlGpmSampleGet")
    gauges = GpuGauges(nvml)
    with pytest.raises(pynvml.NVMLError):
        gauges.read()
    assert nvml.samples == 0


# -- shown -------------------------------------------------------------------------------------------


def test_what_is_known_is_shown_and_nothing_else() -> None:
    view = hardware_view(Reading(compute=0.8, bandwidth=0.55, memory_bytes=3 << 30, power_w=350.5))
    status = make_status(hardware=view)
    assert words.hardware(status) == "busy 80% · bandwidth 55% · 3.0 GiB · 350 W"
    text = exposition(status).decode()
    assert "harli_device_compute_ratio 0.8" in text
    assert "harli_device_power_watts 350.5" in text
    assert "harli_device_tensor_ratio" not in text
    assert "harli_device_lane_busy_ratio" not in text
    lanes = make_status(hardware=HardwareView(inference=0.9, training=0.5))
    assert 'harli_device_lane_busy_ratio{lane="training"} 0.5' in exposition(lanes).decode()
    unread = make_status(hardware=None)
    assert words.hardware(unread) == ""
    assert "harli_device_" not in exposition(unread).decode()
