"""Leases of slots that nobody else needed, in which a micro-batch keeps outputs of its forward pass.

Serving may want any of them back at any time; they are let go at the next unit boundary, and the work goes on
without. Knows leases and the micro-batch; does not know what lies in them.
"""

from __future__ import annotations

from collections.abc import Sequence

from harli_appliance.memory.pool import Lease
from harli_appliance.training.units import MicroBatch


class Spared:
    """Those of one micro-batch; each is for one layer, the last layer's first."""

    def __init__(self, leases: Sequence[Lease] = ()) -> None:
        self._leases = dict(enumerate(leases))
        self._batch: MicroBatch | None = None

    def lend(self, batch: MicroBatch) -> None:
        """To a micro-batch that has not begun."""
        batch.keep_outputs([lease.indices for lease in self._leases.values()])
        self._batch = batch

    @property
    def wanted(self) -> bool:
        """Whether serving wants some back."""
        return any(lease.revoked for lease in self._leases.values())

    def give_back(self) -> None:
        """Let go of what serving wants; no unit is running, on the device either."""
        for number, lease in list(self._leases.items()):
            if lease.revoked:
                if self._batch is not None:
                    self._batch.drop_outputs(number)
                self._leases.pop(number).release()

    def end(self) -> None:
        """Let go of everything; the micro-batch is over, or goes on without."""
        for lease in self._leases.values():
            lease.release()
        self._leases = {}
