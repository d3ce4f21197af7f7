"""Whether a micro-batch that must give up its slots is copied away and back, or dropped and computed again.

Both are predicted from what was measured: bytes against the speed of earlier copies, and the time that the units
of this micro-batch took. Knows numbers only.
"""

from __future__ import annotations

LEARNING = 0.3
"""Weight of a new copy in the running average of the speed."""


class SwapPredictor:
    """Learns how fast bytes move between the KV buffers and host memory."""

    def __init__(self) -> None:
        self._bytes_per_ms: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """None before the first copy."""
        return None if self._bytes_per_ms is None else 1e3 * self._bytes_per_ms

    def copied(self, size: int, took_ms: float) -> None:
        """Learn from a copy of `size` bytes."""
        speed = size / max(took_ms, 1e-3)
        before = speed if self._bytes_per_ms is None else self._bytes_per_ms
        self._bytes_per_ms = before + LEARNING * (speed - before)

    def swaps(self, size: int, *, spent_ms: float, unit_ms: float) -> bool:
        """Whether to copy `size` bytes out and back in.

        It must cost less than the `spent_ms` of units that would be done again. And the way out must take no
        longer than a unit (`unit_ms`), because serving waits for it. Without a measured speed: drop.
        """
        if self._bytes_per_ms is None:
            return False
        copy_ms = size / self._bytes_per_ms
        return copy_ms <= unit_ms and 2 * copy_ms < spent_ms
