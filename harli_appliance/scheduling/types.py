"""What scheduling reads and what it decides. Plain data, milliseconds and counts; no torch, no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from harli_appliance.schema import Mode

UNLIMITED = 1 << 30
"""More work units than any tick can run: training goes on until the next decision."""


@dataclass(frozen=True, slots=True)
class Step:
    """A serving step as the predictor sees it.

    `context_tokens` are the KV rows read, summed over the batch; `prefill_tokens` the prompt tokens computed.
    """

    kind: Literal["prefill", "decode"]
    batch: int
    context_tokens: int
    prefill_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What training could do next: whether a job has work, and how long one unit takes (NaN: unknown)."""

    ready: bool
    unit_ms: float = math.nan


@dataclass(frozen=True, slots=True)
class Bound:
    """A latency prediction: the expected value, and what it exceeds only as rarely as promised."""

    expected_ms: float
    upper_ms: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a tick does.

    Attributes:
        mode: how the lanes are used.
        reason: one short code for why, shown on the dashboard.
        serve: whether the planned step runs now.
        units: work units that training may start until the next decision.
        bound: the prediction for this step in this mode, None without a step or before there are samples.
    """

    mode: Mode
    reason: str
    serve: bool
    units: int
    bound: Bound | None = None
