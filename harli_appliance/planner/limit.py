"""How much finetuning a device could possibly leave room for at a load and a promise: an upper bound.

In shares of the device's compute (its SMs' time), over the time in which requests arrive:

- prompts need p, the time of their FLOPs; decoding needs the FLOPs d;
- decoding moves bytes: each request's K and V as often as it decodes, and the weights once a step. The
  promise T lets steps be T apart and no more while any request decodes, which is for at most the union of the
  intervals from each arrival to `output tokens` times T later: a longer union would mean a broken promise,
  and fewer steps as well. That takes b of the time at full bandwidth;
- a share s of the SMs draws the whole bandwidth, so that bytes cost s b of the SMs' time however they are
  spread;
- where training tokens join a decode step's pass, its bytes come for free, but only forward passes can join,
  a third
  of the work: at training share x, at most x / 3 of the bytes' time.

From x + p + d <= 1 and x + p + s (b - x / 3) <= 1:

    x <= min(1 - p - d, (1 - p - s b) / (1 - s / 3))

Not counted, so that the bound is one: launches, interference between lanes, units that cannot be cut, prompts
that wait for each other, and any uncertainty. It takes requests to start decoding when they arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.planner.roofline import Roofline
from harli_appliance.planner.training import FORWARD_SHARE


@dataclass(frozen=True, slots=True)
class Limit:
    """The bound, and what of the device serving takes at least.

    Attributes:
        share: of the finetuning that the whole device alone makes, x above.
        prompts, decoding, bytes: p, d and b above.
    """

    tokens_per_s: float
    share: float
    prompts: float
    decoding: float
    bytes: float


def physical_limit(
    device: Roofline, trace: Trace, tpot_ms: float, *, appliances: int = 1, decode_only: bool = False
) -> Limit:
    """Finetune tokens per second that no schedule can exceed.

    Args:
        trace: what all appliances together are sent.
        appliances: that share it evenly; decoding weights once for all of them together is counted as
            possible, so that the bound is looser for more.
        decode_only: prompts are read elsewhere.
    """
    model, pace = device.model, tpot_ms / 1e3
    prompt_flops = decode_flops = kv_rows = 0.0
    for request in trace.requests:
        prompt, output = request.prompt_tokens, request.output_tokens - 1
        ends = request.at_s + output * pace
        share = (
            1.0 if ends <= trace.duration_s else max(0.0, trace.duration_s - request.at_s) / (output * pace)
        )
        rows = share * output * (prompt + output / 2)
        kv_rows += rows
        decode_flops += share * output * 2.0 * (model.body_parameters + model.head_parameters)
        decode_flops += rows * model.attention_flops
        prompt_flops += 2.0 * (model.body_parameters * prompt + model.head_parameters)
        prompt_flops += model.attention_flops * prompt * prompt / 2
    if decode_only:
        prompt_flops = 0.0
    steps = _union_s(trace.requests, pace, trace.duration_s) / pace
    seconds = appliances * trace.duration_s
    total = device.flops * seconds
    prompts, decoding = prompt_flops / total, decode_flops / total
    moved = (steps * model.weight_bytes + kv_rows * model.kv_bytes) / (device.bandwidth * seconds)
    fused = (1.0 - prompts - device.saturation * moved) / (1.0 - device.saturation * FORWARD_SHARE)
    share = max(0.0, min(1.0 - prompts - decoding, fused))
    return Limit(appliances * share * device.training_rate(), share, prompts, decoding, moved)


def _union_s(requests: Sequence[TraceRequest], pace: float, until: float) -> float:
    """Seconds in which at least one request decodes, at the promised pace, from its arrival."""
    covered, reached = 0.0, 0.0
    for request in requests:
        end = min(until, request.at_s + (request.output_tokens - 1) * pace)
        start = max(reached, request.at_s)
        if end > start:
            covered += end - start
            reached = end
    return covered
