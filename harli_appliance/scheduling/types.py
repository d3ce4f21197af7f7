"""What scheduling reads and what it decides. Plain data, milliseconds and counts; no torch, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from harli_appliance.scheduling.reasons import Reason
from harli_appliance.schema import Mode

FORWARD_SHARE = 1.0 / 3.0
"""Of a training token's work: 2 of 6 FLOPs a parameter, since backward computes each layer again."""
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
class Split:
    """One way to divide the device between the lanes, as shares of its compute in (0, 1].

    The whole device for one lane at a time (time slicing) is not a split; it is written as None.
    """

    name: str
    inference: float
    training: float


def most_even(splits: Iterable[Split]) -> Split:
    """The one nearest to half each, of at least one."""
    return min(splits, key=lambda split: abs(split.inference - 0.5))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What training could do next: whether a job has work, and how long one unit takes (NaN: unknown).

    Attributes:
        fusible_tokens: tokens of the micro-batch in work whose forward pass has not begun; 0 where a window is
            half way through the layers, in its other passes, and where steps cannot be fused.
        micro_batch_units: units until the micro-batch in work is through, the optimizer's step included where
            one follows; 0 where there is no such thing.
    """

    ready: bool
    unit_ms: float = math.nan
    micro_batch_units: int = 0
    fusible_tokens: int = 0


class Answering(NamedTuple):
    """A request that has its first token.

    Attributes:
        slack_ms: time until its next token is due.
        left: tokens that are still to come in nearly every such case, >= 0.
        tpot_ms: what it is promised per token.
    """

    slack_ms: float
    left: int
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Queue:
    """What stands between two steps, while prompts wait or are half read.

    Attributes:
        patience_ms: time until one of them has used up the share of its promised time to the first token
            (`slo.PATIENCE`) for which it may be kept waiting.
        answering: requests whose tokens a prompt would hold up.
    """

    patience_ms: float
    answering: Sequence[Answering]


Admission = Literal["all", "answers", "none"]
"""Which requests the next step may be planned from: all; those that have their first token, while prompts wait; or
none, while training has the device."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A latency prediction: the expected value, and what it exceeds only as rarely as promised."""

    expected_ms: float
    upper_ms: float


class Costs(Protocol):
    """Latencies as policies see them: learned (`predictor.Predictor`) or of a simulated device.

    Every method answers None (or NaN) for what it does not know, which is never permission.
    """

    def solo(self, step: Step, split: Split | None = None) -> Bound | None:
        """The step with nothing beside it, on the inference side of `split` or on the whole device."""
        ...

    def corun(self, step: Step, split: Split | None = None) -> Bound | None:
        """The step on the inference side with training beside it; None is the only split there is."""
        ...

    def fused(self, step: Step, tokens: int) -> Bound | None:
        """The step with the forward pass of `tokens` training tokens in the same pass over the weights."""
        ...

    def training_rate(self, split: Split | None = None) -> float:
        """Tokens trained per second (forward, loss and backward) on the training side of `split`, beside
        serving, or on the whole device alone."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What a tick does.

    Attributes:
        mode: how the lanes are used.
        reason: why; `reasons.in_words` says it to a person.
        units: work units that training may start until the next decision; the next tick waits for a limited
            number of them.
        bound: the prediction for this step in this mode, None without a step or before there are samples.
        split: how the device is divided in mode `partition`; None where there is only one way.
        fused_tokens: training tokens whose forward pass rides along in mode `fused`.
        after: work units that run on the whole device when the step has ended, before the next tick.
    """

    mode: Mode
    reason: Reason
    units: int
    bound: Bound | None = None
    split: Split | None = None
    fused_tokens: int = 0
    after: int = 0
