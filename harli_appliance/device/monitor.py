"""What the device does right now, read once a second on a thread of its own, off the event loop and the lanes.

Knows when to read; does not know what is read (`monitor_cpu`, `monitor_gpu`) nor who looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)

PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the device. Shares are from 0 to 1 over the last second; None is what the device does not tell.

    Attributes:
        compute: share of cores or SMs that were busy.
        inference: the same for the inference lane's cores alone; a GPU does not tell its partitions apart.
        training: the same for the training lane's cores.
        tensor: share of the time in which tensor cores were busy.
        bandwidth: share of the memory bandwidth.
        memory_bytes: held by this process on a CPU, by everybody on a GPU.
        memory_total_bytes: what the device has.
    """

    compute: float | None = None
    inference: float | None = None
    training: float | None = None
    tensor: float | None = None
    bandwidth: float | None = None
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    clock_mhz: float | None = None


class Gauges(Protocol):
    """Where readings come from. Used by one thread; `read` may take milliseconds."""

    def read(self) -> Reading: ...
    def close(self) -> None: ...


class Monitor:
    """Reads gauges once a second until closed.

    Args:
        open_gauges: called on the monitor's thread; what it raises is told and ends the monitor, nothing else.
        period_s: seconds between two readings.
    """

    def __init__(self, open_gauges: Callable[[], Gauges], period_s: float = PERIOD_S) -> None:
        self._open = open_gauges
        self._period_s = period_s
        self._latest: Reading | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_forever, name="monitor", daemon=True)
        self._thread.start()

    @property
    def latest(self) -> Reading | None:
        """None before the first reading, and since the last one failed."""
        return self._latest

    def close(self) -> None:
        """Stop reading; waits for the reading in work."""
        self._closing.set()
        self._thread.join()

    def _read_forever(self) -> None:
        try:
            gauges = self._open()
        except Exception as error:
            log.warning("the device cannot be read", why=_why(error))
            return
        failing = False
        while not self._closing.is_set():
            try:
                self._latest = gauges.read()
                failing = False
            except Exception as error:
                # A driver may lose its device; serving goes on, and the next reading may work again.
                self._latest = None
                if not failing:
                    log.warning("the device cannot be read", why=_why(error))
                failing = True
            self._closing.wait(self._period_s)
        gauges.close()


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
