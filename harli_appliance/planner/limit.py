"""How much finetuning a device could possibly leave room for at a load and a promise: an upper bound.

Serving has to be done, and training has what that leaves. A linear program finds the decode steps that leave most
of it, where a step may run alone, with training tokens in its pass, or beside training on any of the splits:

- No request falls behind the promised pace: token i is due i promised times per token after the request arrived,
  as the scheduler counts it. Up to the end of each period there are at least the steps, tokens and rows of
  the cache that are due by then (`demand`), and a step reads no more than there are requests.
- A step takes at least what the tangents of its cost in requests, rows and training tokens say. It may be of any
  size, which only makes the bound looser: costs are convex.
- A step is charged what training could do on the whole device meanwhile, less what it does beside it. Only
  forward passes of training can join a step, a third of the work: no more tokens than are trained.
- Steps do not overlap, so they take at most the time in which there are requests, nor with reading prompts, which
  takes the time of its FLOPs.

Not counted, so that the bound is one: units that cannot be cut, prompts that wait for each other, what happens
within a period, and any uncertainty; one step may serve several appliances. It takes requests to start decoding
when they arrive, and the device to cost what the planner takes it to cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from harli_appliance.bench.traces import Trace
from harli_appliance.planner.demand import Array, Demand, demand_of
from harli_appliance.planner.device import StepWork, decode_work
from harli_appliance.planner.roofline import Roofline
from harli_appliance.scheduling.types import FORWARD_SHARE, Split

BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512)
CONTEXTS = (0.5, 1.0, 2.0)
"""Rows per request, in those of the trace."""
FUSED = range(0, 1025, 32)
"""Where tangents touch the costs."""
DIGITS = 9
"""After which tangents count as the same one."""
INFEASIBLE = 2
"""As HiGHS says it through scipy."""
OVERRUN = 10.0
"""Price of time beyond what there is, in what training makes of it: only serving that needs it takes any."""

Cost = Callable[[StepWork, int], float]
"""Milliseconds of a step with so many training tokens in its pass."""


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
    """A way to make a step.

    Attributes:
        planes: that touch its cost from below, (planes, 4): milliseconds, and more for each request, row of the
            cache and fused token.
        lost: of what training makes alone in the time of such a step.
    """

    planes: Array
    lost: float


def physical_limit(
    device: Roofline, trace: Trace, tpot_ms: float, *, appliances: int = 1, decode_only: bool = False
) -> Limit:
    """Finetune tokens per second that no schedule can exceed.

    Args:
        trace: what all appliances together are sent.
        appliances: that share it.
        decode_only: prompts are read elsewhere.
    """
    rate, seconds = device.training_rate(), appliances * trace.duration_s
    prompts = 0.0 if decode_only else _prompt_flops(device, trace) / (device.flops * seconds)
    demand = demand_of(trace, tpot_ms / 1e3)
    steps = float(demand.steps.sum())
    share = max(0.0, 1.0 - prompts)
    if steps:
        share = min(share, _best(device, demand, seconds, appliances, 1.0 - prompts))
    return Limit(appliances * share * rate, share, prompts, steps / trace.duration_s)


def _prompt_flops(device: Roofline, trace: Trace) -> float:
    model = device.model
    return sum(
        2.0 * (model.body_parameters * request.prompt_tokens + model.head_parameters)
        + model.attention_flops * request.prompt_tokens**2 / 2
        for request in trace.requests
    )


def _choices(device: Roofline, rows_per_request: float) -> list[_Choice]:
    """Alone or with training tokens in its pass, then beside training on each of the splits."""

    def beside(split: Split) -> Cost:
        return lambda work, _: device.corun_ms(work, split)

    rate = device.training_rate()
    return [
        _Choice(tangents(device.fused_ms, rows_per_request, FUSED), 1.0),
        *(
            _Choice(
                tangents(beside(split), rows_per_request, (0,)),
                1.0 - device.corun_training_rate(split) / rate,
            )
            for split in device.splits
        ),
    ]


def tangents(cost: Cost, rows_per_request: float, fused: Sequence[int]) -> Array:
    """Planes below a cost that is convex in requests, rows and training tokens.

    Returns:
        (planes, 4): milliseconds, and more for each request, row and training token.
    """
    found = []
    for batch, context, tokens in itertools.product(BATCHES, CONTEXTS, fused):
        rows = round(batch * context * rows_per_request)
        at = cost(decode_work(batch, rows), tokens)
        slopes = np.array([
            cost(decode_work(batch + 1, rows), tokens) - at,
            cost(decode_work(batch, rows + 1), tokens) - at,
            cost(decode_work(batch, rows), tokens + 1) - at,
        ])  # fmt: skip
        found.append([at - slopes @ (batch, rows, tokens), *slopes])
    return np.unique(np.round(found, DIGITS), axis=0)


def _best(device: Roofline, demand: Demand, seconds: float, appliances: int, left: float) -> float:
    """Share of the device's finetuning that the best steps leave.

    Args:
        seconds: of all appliances together.
        left: share of the time that prompts leave.
    """
    periods, total_ms = len(demand.steps), 1e3 * seconds
    trained = device.training_rate() * seconds
    batch, rows = demand.tokens.sum() / demand.steps.sum(), demand.rows.sum() / demand.steps.sum()
    choices = _choices(device, rows / batch)

    # A period's variables: steps of each choice, requests and rows in them in units of `batch` and `rows`, and
    # their milliseconds; then fused tokens, and milliseconds beyond what there is. Each name below is a row that
    # picks one of them.
    unit = np.eye(4 * len(choices) + 2)
    steps, requests, read, ms = (unit[kind:-2:4] for kind in range(4))
    fused, over = unit[-2:]
    costs = [
        base * steps[index]
        + request * batch * requests[index]
        + row * rows * read[index]
        + token * fused
        - ms[index]
        for index, choice in enumerate(choices)
        for base, request, row, token in choice.planes
    ]
    taken = ms.sum(axis=0) - over
    lost = np.array([choice.lost for choice in choices]) @ ms / total_ms - FORWARD_SHARE * fused / trained

    each, until, whole = sparse.eye_array(periods), np.tri(periods), np.ones((1, periods))
    at_most = [
        (sparse.kron(each, costs), 0.0),
        (sparse.kron(each, requests) - sparse.kron(np.diag(demand.present / batch), steps), 0.0),
        (sparse.kron(each, read) - sparse.kron(np.diag(demand.present_rows / rows), steps), 0.0),
        (sparse.kron(each, [taken]), 1e3 * appliances * demand.busy_s),
        (sparse.kron(until, [-steps.sum(axis=0)]), -demand.steps.cumsum()),
        (sparse.kron(until, [-requests.sum(axis=0)]), -demand.tokens.cumsum() / batch),
        (sparse.kron(until, [-read.sum(axis=0)]), -demand.rows.cumsum() / rows),
        (sparse.kron(whole, [taken / total_ms]), left),
        (sparse.kron(whole, [lost]), left),
        (sparse.kron(whole, [fused / trained]), 0.0),
    ]
    # The last variable is the share: what is left without what is lost, at most, and at least what is fused.
    matrix = sparse.vstack([part for part, _ in at_most])
    share = np.zeros((matrix.shape[0], 1))
    share[-2:, 0] = 1.0, -1.0
    found = linprog(
        np.append(np.tile(OVERRUN * over / total_ms, periods), -1.0),
        A_ub=sparse.hstack([matrix, share]),
        b_ub=np.concatenate([np.broadcast_to(bound, part.shape[0]) for part, bound in at_most]),
    )
    if found.status == INFEASIBLE:  # what has to be served takes more than there is
        return 0.0
    if not found.success:
        raise RuntimeError(f"the physical limit was not found: {found.message}")
    return max(0.0, float(found.x[-1]))
