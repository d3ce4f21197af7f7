"""How much finetuning a device could possibly leave room for at a load and a promise: an upper bound.

A linear program over what decode steps could be on this device: alone, beside training on any of its splits, or
fused with so many training tokens. Serving has to be done, and training has what that leaves:

- Every request needs its steps within its window, from its arrival to `output tokens` times the promise T
  later. Steps serve all who are there, so there must be at least as many as it takes to have enough in each
  window (`fewest_steps`), and they read each request's K and V as often as it decodes.
- A step is charged what training could do on the whole device meanwhile, less what it does beside it or in it.
  Costs grow convexly with the rows that a step reads, so a tangent is below them; sizes and rows are given to
  the choices independently of each other, which only makes the bound looser.
- Steps cannot take longer than there are requests, which is for at most the union of all windows, nor overlap
  with reading prompts.
- Only forward passes of training can join a step, a third of the work: no more tokens than are trained.
- Prompts take the time of their FLOPs, decoding at least that of its own.

Not counted, so that the bound is one: units that cannot be cut, prompts that wait for each other, and any
uncertainty; one step may serve several appliances. It takes requests to start decoding when they arrive, all
promises to be kept, and the device to cost what the planner takes it to cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.planner.device import decode_work
from harli_appliance.planner.roofline import Roofline
from harli_appliance.planner.training import FORWARD_SHARE

FUSED_GRAIN = 16
"""Fused steps carry multiples of so many tokens."""
FUSED_MOST = 1024
NEAR = 0.01
"""Of the mean number of rows: how far from it the tangent's other point is."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The bound, and what of the device serving takes at least.

    Attributes:
        share: of the finetuning that the whole device alone makes.
        prompts: share of the time that prompts take.
        steps_per_s: decode steps that it takes at least.
    """

    tokens_per_s: float
    share: float
    prompts: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a decode step could be; it takes at least ``step_s + row_s rows`` seconds.

    Attributes:
        trained: finetune tokens per second of it.
        fused: training tokens that join its pass.
    """

    step_s: float
    row_s: float
    trained: float = 0.0
    fused: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """Where a request needs `steps` decode steps, in seconds."""

    start: float
    end: float
    steps: int


def physical_limit(
    device: Roofline, trace: Trace, tpot_ms: float, *, appliances: int = 1, decode_only: bool = False
) -> Limit:
    """Finetune tokens per second that no schedule can exceed.

    Args:
        trace: what all appliances together are sent.
        appliances: that share it.
        decode_only: prompts are read elsewhere.
    """
    seconds, rate, model = appliances * trace.duration_s, device.training_rate(), device.model
    fastest_s = device.solo_ms(decode_work(1, 0)) / 1e3
    windows = [_window(request, tpot_ms / 1e3, fastest_s, trace.duration_s) for request in trace.requests]
    rows = sum(window.steps * (request.prompt_tokens + window.steps / 2)
               for window, request in zip(windows, trace.requests, strict=True))  # fmt: skip
    tokens = sum(window.steps for window in windows)
    decode_flops = (
        2.0 * (model.body_parameters + model.head_parameters) * tokens + model.attention_flops * rows
    )
    prompts = 0.0 if decode_only else _prompt_flops(device, trace) / (device.flops * seconds)
    most = max(0.0, 1.0 - prompts - decode_flops / (device.flops * seconds))
    steps = fewest_steps(windows, fastest_s)
    if steps:
        busy_s = min(appliances * _union_s(windows), seconds * (1.0 - prompts))
        choices = list(_choices(device, rows / steps))
        most = min(most, _best(choices, steps, rows, busy_s, seconds, rate, 1.0 - prompts))
    return Limit(appliances * most * rate, most, prompts, steps / trace.duration_s)


def _window(request: TraceRequest, pace_s: float, fastest_s: float, until: float) -> Window:
    """Of a window that goes on after the end of the trace, what cannot be left for later."""
    steps = request.output_tokens - 1
    end = request.at_s + steps * pace_s
    after = max(0.0, end - until)
    return Window(request.at_s, end - after, max(0, steps - math.ceil(after / fastest_s)))


def _prompt_flops(device: Roofline, trace: Trace) -> float:
    model = device.model
    return sum(
        2.0 * (model.body_parameters * request.prompt_tokens + model.head_parameters)
        + model.attention_flops * request.prompt_tokens**2 / 2
        for request in trace.requests
    )


def fewest_steps(windows: Sequence[Window], step_s: float) -> int:
    """The smallest number of steps, at least `step_s` apart, that has enough of them in every window.

    Windows in the order of their ends, each given the latest steps that are still missing, which serve most of
    those to come. Steps that are apart fall into different cells of a grid of `step_s`.
    """
    if not windows:
        return 0
    taken = np.zeros(int(max(window.end for window in windows) / step_s) + 1, dtype=bool)
    for window in sorted(windows, key=lambda window: window.end):
        cells = taken[int(window.start / step_s) : int(window.end / step_s) + 1]
        missing = window.steps - int(cells.sum())
        if missing > 0:
            cells[np.flatnonzero(~cells)[-missing:]] = True
    return int(taken.sum())


def _union_s(windows: Sequence[Window]) -> float:
    """Seconds in which at least one request decodes, at the promised pace."""
    covered, reached = 0.0, 0.0
    for window in windows:
        if window.end > reached:
            covered += window.end - max(reached, window.start)
            reached = window.end
    return covered


def _choices(device: Roofline, rows: float) -> Iterator[_Choice]:
    """Everything that a step can be, with the tangents of its costs at `rows` rows."""
    near = decode_work(1, round(rows)), decode_work(1, round(rows * (1.0 + NEAR)) + 1)

    def choice(costs_ms: Sequence[float], trained: float = 0.0, fused: int = 0) -> _Choice:
        row_ms = (costs_ms[1] - costs_ms[0]) / (near[1].pairs - near[0].pairs)
        return _Choice((costs_ms[0] - row_ms * near[0].pairs) / 1e3, row_ms / 1e3, trained, fused)

    yield choice([device.solo_ms(work) for work in near])
    for split in device.splits:
        yield choice([device.corun_ms(work, split) for work in near], device.corun_training_rate(split))
    for tokens in range(FUSED_GRAIN, FUSED_MOST + 1, FUSED_GRAIN):
        yield choice([device.fused_ms(work, tokens) for work in near], fused=tokens)


def _best(
    choices: Sequence[_Choice],
    steps: int,
    rows: float,
    busy_s: float,
    seconds: float,
    rate: float,
    left: float,
) -> float:
    """Share of the device's finetuning that the best mixture of steps leaves.

    Args:
        busy_s: that all steps together may take, over all appliances.
        left: share of the time that prompts leave.
    """
    # Variables: steps of each choice in units of all steps, rows of each in units of all rows, and the share.
    step_s = steps * np.array([choice.step_s for choice in choices])
    row_s = max(rows, 1.0) * np.array([choice.row_s for choice in choices])
    lost = 1.0 - np.array([choice.trained for choice in choices]) / rate
    fused = steps * np.array([choice.fused for choice in choices]) / (rate * seconds)
    busy_s = max(busy_s, step_s[0] + row_s[0])  # serving alone keeps the promise, as far as it does
    none, one = np.zeros(len(choices)), np.ones(len(choices))
    found = linprog(
        np.concatenate([none, none, [-1.0]]),
        A_ub=[
            np.concatenate([lost * step_s / seconds - FORWARD_SHARE * fused, lost * row_s / seconds, [1.0]]),
            np.concatenate([step_s, row_s, [0.0]]) / busy_s,
            np.concatenate([fused, none, [-1.0]]),
            np.concatenate([-one, none, [0.0]]),
        ],
        b_ub=[left, 1.0, 0.0, -1.0],
        A_eq=[np.concatenate([none, one, [0.0]])],
        b_eq=[1.0],
    )
    return max(0.0, float(found.x[-1])) if found.success else 0.0
