"""A finetuning job without end, as far as its pace goes: micro-batches of work units, their slots, tokens done.

Progress within a micro-batch is measured in token equivalents: forward passes are the first third (2 of 6
FLOPs a parameter and token), backward passes the rest. A token counts as trained as its backward pass goes
on, and no longer when its micro-batch is dropped. Knows no device and no clock; the simulator tells it how
far it came.
"""

from __future__ import annotations

import math

from harli_appliance.planner.device import Device
from harli_appliance.scheduling.types import Outlook

UNIT_WEIGHT = 0.1
"""Of the newest unit in the average time of its kind, as in the trainer."""


class SimulatedTraining:
    """Args: tokens: of a micro-batch, at least as many as a window of `device.window_tokens`."""

    def __init__(self, device: Device, tokens: int) -> None:
        windows = -(-tokens // device.window_tokens)
        rate, mix = device.training_rate(), device.units
        self.slots = device.lease_slots(tokens)
        """That a micro-batch leases."""
        self.trained = 0.0
        """Tokens whose backward pass is done."""
        self.dropped = 0.0
        """Token equivalents of work that was lost with dropped micro-batches."""
        self.worked = 0.0
        """Token equivalents of all work, the lost included."""
        self.leased = False
        self._ends = False
        self._tokens = float(tokens)
        self._units = round(mix.forward + mix.backward) * windows
        self._forward_share = mix.forward_share
        self._forward = tokens * mix.forward_share
        self._fuses = device.fuses
        self._at = 0.0
        self._forward_unit = self._forward / (mix.forward * windows)
        self._backward_unit = (tokens - self._forward) / (mix.backward * windows)
        self._slowest = mix.slowest * tokens / self._units
        self._slow_share = mix.slow_share
        self.unit_ms = 1e3 * self._slowest / (rate if device.splits else device.corun_training_rate(None))
        """A unit of the slowest kind: on the whole device, or where there is only one way to divide it, as it went
        lately, which is beside requests at first."""

    def outlook(self) -> Outlook:
        if not self.leased:
            return Outlook(False, self.unit_ms)
        fusable = self.forward_tokens_left if self._fuses else 0
        return Outlook(True, self.unit_ms, self._units_left(), fusable)

    @property
    def forward_tokens_left(self) -> int:
        """Tokens whose forward pass could join a serving step now."""
        if not self.leased:
            return 0
        return max(0, int((self._forward - self._at) / self._forward_share + 1e-9))

    def _units_left(self) -> int:
        return max(1, round(self._units * (1.0 - self._at / self._tokens)))

    def went(self, amount: float, tokens_per_s: float) -> None:
        """Units were measured, as the trainer measures them: `amount` token equivalents, at that speed."""
        slow = self._slow_share * self._units * amount / self._tokens
        unit_ms = 1e3 * self._slowest / tokens_per_s
        self.unit_ms += (1.0 - (1.0 - UNIT_WEIGHT) ** slow) * (unit_ms - self.unit_ms)

    # -- progress ----------------------------------------------------------------------------------------

    def run(self, amount: float) -> None:
        """Do `amount` token equivalents of work, through as many micro-batches as it takes and slots allow."""
        while amount > 0.0:
            done = min(amount, self._tokens - self._at)
            self.worked += done
            before = self._credit()
            self._at += done
            self.trained += self._credit() - before
            amount -= done
            if self._at >= self._tokens - 1e-9:
                self._at = 0.0
                if self._ends:
                    self.leased = self._ends = False
                    return

    def forward(self, tokens: int) -> None:
        """The forward pass of `tokens` tokens, at most `forward_tokens_left`."""
        self.run(tokens * self._forward_share)

    def amount_of(self, units: int) -> float:
        """Token equivalents of the next `units` units, at most those of this micro-batch and of the next."""
        amount, at = 0.0, self._at
        while units > 0:
            forward = at < self._forward - 1e-9
            size = self._forward_unit if forward else self._backward_unit
            end = self._forward if forward else self._tokens
            here = min(units, max(1, round((end - at) / size)))
            step = min(here * size, end - at)
            amount, at, units = amount + step, at + step, units - here
            if at >= self._tokens - 1e-9:
                at = 0.0
        return amount

    def end_after_this(self) -> None:
        """Give the slots back when the micro-batch under way has ended."""
        self._ends = True

    @property
    def left(self) -> float:
        """Token equivalents until that, infinity where it goes on with the next one."""
        return self._tokens - self._at if self._ends else math.inf

    def drop(self) -> None:
        """Serving takes the slots back: the micro-batch in flight is done again later."""
        self.trained -= self._credit()
        self.dropped += self._at
        self._at = 0.0
        self.leased = self._ends = False

    def _credit(self) -> float:
        return max(0.0, self._at - self._forward) / (1.0 - self._forward_share)
