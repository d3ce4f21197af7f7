"""What the engine tells about itself over time: rates of the last seconds and the timeline's samples.

Kept in memory, bounded. Knows counts and times; does not know where they come from.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from harli_appliance.memory.pool import PoolUse
from harli_appliance.schema import Mode, PoolView, Sample, Timeline

RATE_WINDOW_S = 10.0
SAMPLE_EVERY_S = 0.25
KEPT_SAMPLES = 14_400
"""One hour at four a second."""


class Rate:
    """A monotonic count per second over the last `RATE_WINDOW_S`."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def at(self, now: float, total: float) -> float:
        """Note the total at `now` and return the rate."""
        self._points.append((now, total))
        while len(self._points) > 2 and self._points[1][0] <= now - RATE_WINDOW_S:
            self._points.popleft()
        (first, before), (last, after) = self._points[0], self._points[-1]
        return max(0.0, after - before) / (last - first) if last > first else 0.0


class Telemetry:
    """Collects between samples, then makes one."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._next = 0
        self._steps_ms: list[float] = []
        self._gaps_ms: list[float] = []
        self._output_tokens = 0
        self._trained_before = 0
        self._loss: float | None = None

    def step(self, took_ms: float, tokens: int) -> None:
        self._steps_ms.append(took_ms)
        self._output_tokens += tokens

    def gap(self, itl_ms: float) -> None:
        self._gaps_ms.append(itl_ms)

    def loss(self, value: float) -> None:
        self._loss = value

    @property
    def unsampled(self) -> bool:
        """Whether something happened since the last sample."""
        return bool(self._steps_ms) or self._loss is not None

    def sample(self, wall: float, mode: Mode, running: int, trained_tokens: int, pool: PoolUse) -> None:
        """Close the current interval.

        Args:
            wall: seconds since the epoch.
            trained_tokens: total so far.
        """
        self._samples.append(
            Sample(
                seq=self._next,
                t=wall,
                mode=mode,
                running=running,
                step_ms=_median(self._steps_ms),
                tpot_ms=_median(self._gaps_ms),
                output_tokens=self._output_tokens,
                training_tokens=max(0, trained_tokens - self._trained_before),
                loss=self._loss,
                pool=pool_view(pool),
            )
        )
        self._next += 1
        self._steps_ms.clear()
        self._gaps_ms.clear()
        self._output_tokens = 0
        self._trained_before = trained_tokens
        self._loss = None

    def since(self, seq: int) -> Timeline:
        return Timeline(samples=[s for s in self._samples if s.seq >= seq], next=self._next)


def pool_view(use: PoolUse) -> PoolView:
    return PoolView(
        slots=use.slots,
        free=use.free,
        serving=use.serving,
        cached=use.cached,
        leased=use.leased,
        leased_max=use.leased_max,
        reclaims=use.reclaims,
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
