"""A switch that does not flap: it opens with some room to spare and closes only when there is none."""

from __future__ import annotations


class Hysteresis:
    def __init__(self) -> None:
        self.open = True

    def update(self, room: float, margin: float) -> bool:
        """Whether the switch is open now.

        Args:
            room: what is left, in any unit; below zero the switch closes.
            margin: room that a closed switch needs to open again, >= 0.
        """
        self.open = room >= (0.0 if self.open else margin)
        return self.open
