"""What the appliance says about itself on ``/harli/v1``: the wire types shared with CLI, dashboard and demo.

Plain pydantic models. Knows neither torch nor aiohttp, so that a client can import it quickly.
Times are seconds since the epoch unless a name ends in ``_ms`` or ``_s``.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict

from harli_appliance.errors import UsageError
from harli_appliance.scheduling.names import POLICY_NAMES, check_policy

Mode = Literal["idle", "pause", "time_slice", "partition", "fused", "training"]
"""What a tick does: nothing; serve while training waits; alternate; both lanes at once; training tokens in the
serving step; train only."""


def _known_policy(name: str) -> str:
    try:
        return check_policy(name)
    except UsageError as error:  # pydantic names the field at fault only for a ValueError
        raise ValueError(error.message) from error


PolicyName = Annotated[str, AfterValidator(_known_policy)]
"""One of `scheduling.names.POLICY_NAMES`."""

JobOrder = Literal["fair", "fifo"]
"""How running jobs share the device: by priority, or one after the other."""

LearningRateSchedule = Literal["cosine", "linear", "constant"]
"""What the learning rate does after its warm-up: falls to a tenth along half a cosine or a line, or stays."""

PeftMethod = Literal["lora", "dora", "ia3"]
"""How a model is adapted; rsLoRA is "lora" with another scale."""

TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGET_MODULES: tuple[str, ...] = get_args(TargetModule)
"""Projections of a decoder layer that can be adapted."""

DataFormat = Literal["chat", "text", "preference"]
"""What the lines of a training file are: OpenAI's conversations, ``{"text": ...}``, or OpenAI's preferences."""

TrainingMethod = Literal["supervised", "dpo"]

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
"""The states that a job never leaves."""


def waits_for(status: JobStatus, model: str, served: str) -> str | None:
    """The model of a job that has not ended, where another one is served: it waits for that."""
    return None if status in ENDED or model == served else model


SloClass = Literal["interactive", "standard", "batch"]
"""Who waits for the answer: a person who reads along, an application, nobody."""


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Percentiles(Wire):
    """Milliseconds over the recent window (last 512 samples); None until there is one."""

    p50: float | None = None
    p99: float | None = None
    last: float | None = None


class SloClassView(Wire):
    name: SloClass
    tpot_ms: float
    ttft_ms: float
    requests: int
    """Since start."""
    attainment: float | None = None
    tpot_p99_ms: float | None = None
    ttft_p99_ms: float | None = None


class SloView(Wire):
    tpot_ms: float
    """The promise to class ``standard``, as `ttft_ms`."""
    ttft_ms: float
    attainment: float | None = None
    """Share of finished requests of the recent window (last 512) that met both targets of their class."""
    classes: list[SloClassView] = []


class ServingView(Wire):
    running: int
    waiting: int
    requests: int
    failed: int
    tpot_ms: Percentiles
    """Per request: (last token - first token) / (tokens - 1)."""
    itl_ms: Percentiles
    """Each gap between two tokens of a request."""
    ttft_ms: Percentiles
    output_tokens: int
    output_tokens_per_s: float
    """Over the last 10 seconds."""


class RunningJobView(Wire):
    """Of a job that runs, straight from the trainer."""

    job: str
    step: int
    total_steps: int
    loss: float | None = None
    device_share: float
    """Of the device time that training had lately, in [0, 1]."""
    remaining_s: float | None = None
    """To its end, at the pace since it began or was resumed; None before it made a step."""


class TrainingView(Wire):
    tokens: int
    """Tokens whose backward pass is done, since start."""
    tokens_per_s: float
    """Over the last 10 seconds."""
    running: list[RunningJobView] = []
    """In the order in which they began."""
    dropped_micro_batches: int = 0
    swapped_micro_batches: int = 0


class PartitionView(Wire):
    inference: str
    training: str
    inference_share: float


class HardwareView(Wire):
    """The device over the last second. Shares are from 0 to 1; None is what this device does not tell."""

    compute: float | None = None
    """Share of cores or SMs that were busy."""
    inference: float | None = None
    """The same for the inference lane's cores (CPU only)."""
    training: float | None = None
    """The same for the training lane's cores (CPU only)."""
    tensor: float | None = None
    """Share of the time in which tensor cores were busy."""
    bandwidth: float | None = None
    """Share of the memory bandwidth."""
    memory_bytes: int | None = None
    """Held by the appliance on a CPU, by everybody on a GPU."""
    memory_total_bytes: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    clock_mhz: float | None = None


class PoolView(Wire):
    """Slots by owner; free + serving + cached + leased = slots."""

    slots: int
    free: int
    serving: int
    cached: int
    leased: int
    leased_max: int
    reclaims: int


class PredictorView(Wire):
    samples: int
    median_error: float | None = None
    """Median of |predicted - measured| / measured over recent steps."""
    above_bound: float | None = None
    """Share of recent steps that took longer than the bound."""


class JobView(Wire):
    id: str
    status: JobStatus
    model: str
    fine_tuned_model: str | None = None
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    priority: int = 10
    device_share: float | None = None
    """Of a running job: its share of the device time that training had lately."""
    remaining_s: float | None = None
    """Of a running job: to its end, at the pace since it began or was resumed."""
    waits_for: str | None = None
    """Of a job that has not ended: its model, while another one is served."""
    suffix: str | None = None
    created_at: int
    error: str | None = None


class ModelView(Wire):
    id: str
    kind: Literal["base", "adapter"]
    parent: str | None = None
    job: str | None = None


class Status(Wire):
    version: str
    state: Literal["starting", "ready", "degraded", "stopping"]
    uptime_s: float
    model: str
    device: str
    policy: str
    policies: list[str] = list(POLICY_NAMES)
    """Those that this appliance can use."""
    mode: Mode
    reason: str
    """Why the scheduler decided as it did in the last tick, one short code; see `scheduling.reasons`."""
    ticks: dict[str, int] = {}
    """Ticks since start, by their reason."""
    slo: SloView
    serving: ServingView
    training: TrainingView
    partition: PartitionView
    pool: PoolView
    predictor: PredictorView
    jobs: list[JobView]
    """Running, queued in their order, paused, then what ended last; twenty at most."""
    models: list[ModelView]
    hardware: HardwareView | None = None
    """None until the device has been read, and while it cannot be."""


class Sample(Wire):
    """One point of the timeline, taken every 250 ms while anything runs."""

    seq: int
    t: float
    mode: Mode
    running: int
    step_ms: float | None
    """Median serving step since the previous sample."""
    tpot_ms: float | None
    """Median inter-token latency since the previous sample."""
    output_tokens: int
    """Tokens served since the previous sample."""
    training_tokens: int
    """Tokens trained since the previous sample."""
    loss: float | None
    """Loss of an optimizer step that ended since the previous sample."""
    pool: PoolView


class Timeline(Wire):
    samples: list[Sample]
    next: int
    """Pass as ``since`` to get only newer samples."""


class PolicyChange(Wire):
    """Body of ``POST /harli/v1/policy``; fields left out stay as they are."""

    model_config = ConfigDict(extra="forbid")

    policy: PolicyName | None = None
    slo_tpot_ms: float | None = None
    slo_ttft_ms: float | None = None
