"""What the HTTP API asks of the appliance. `appliance.py` answers; tests answer with fakes.

These protocols keep aiohttp away from the engine and SQL away from the routes. Every method raises only
`HarliError`s for things a person can cause.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from harli_appliance.schema import (
    TARGET_MODULES,
    DataFormat,
    JobStatus,
    LearningRateSchedule,
    ModelView,
    PeftMethod,
    PolicyChange,
    SloClass,
    Status,
    Timeline,
    TrainingMethod,
)

FinishReason = Literal["stop", "length"]

PRIORITY = 10
"""Of a job that says none."""


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A validated chat completion request.

    `messages` hold at least ``role`` and ``content`` (a string). `max_tokens` None means as long as the
    context allows. Sampling values are already range-checked.
    """

    model: str
    messages: Sequence[Mapping[str, str]]
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Of the first choice; choice i uses `seed` + i."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    """Choices: answers to the same messages, drawn independently."""
    logprobs: int | None = None
    """Most likely tokens to report beside each drawn one; None reports no probabilities at all."""
    slo_class: SloClass = "standard"
    json_schema: str | None = None
    """JSON text of a schema that the answer must satisfy; whether it can be enforced is not checked yet."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability; `top` holds the most likely ones at its place."""

    token: bytes
    """UTF-8, but perhaps only a part of a character."""
    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of one or more new tokens of one choice; the choice's last one carries the finish reason.

    `logprobs`, when asked for, are those of the tokens that the text comes from.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    choice: int = 0
    logprobs: tuple[Logprob, ...] = ()


class Generation(Protocol):
    """One running answer of one or more choices, whose deltas come as they are made.

    Iterate it to the end, or `abort` it (idempotent, also after the end).
    """

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache; known once the first delta arrived."""
        ...

    def __aiter__(self) -> AsyncIterator[TextDelta]: ...
    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    format: DataFormat = "chat"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a person asks for. None means the appliance's default, stored with the job when it is created."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    method: TrainingMethod = "supervised"
    beta: float | None = None
    n_epochs: int | None = None
    batch_size: int | None = None
    """Examples of one optimizer step."""
    learning_rate: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool | None = None
    lora_dropout: float | None = None
    peft_method: PeftMethod | None = None
    target_modules: tuple[str, ...] | None = None
    lr_scheduler_type: LearningRateSchedule | None = None
    warmup_ratio: float | None = None
    max_grad_norm: float | None = None
    priority: int | None = None
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """A finetuning job as kept in the database; every hyperparameter is resolved."""

    id: str
    status: JobStatus
    model: str
    training_file: str
    created_at: int
    seed: int
    n_epochs: int
    batch_size: int
    learning_rate: float
    lora_rank: int
    lora_alpha: float
    method: TrainingMethod = "supervised"
    beta: float = 0.1
    """Of DPO: how strongly the adapter is held to the base model."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that is dropped while learning."""
    peft_method: PeftMethod = "lora"
    target_modules: tuple[str, ...] = TARGET_MODULES
    """Projections of each decoder layer that are adapted, of `schema.TARGET_MODULES`."""
    lr_scheduler_type: LearningRateSchedule = "cosine"
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises to `learning_rate`."""
    max_grad_norm: float = 1.0
    """Gradients with a larger 2-norm are scaled down to it; 0 leaves them alone."""
    validation_file: str | None = None
    """Examples on which the loss is computed and nothing is learned."""
    eval_steps: int = 10
    """Optimizer steps between two evaluations."""
    early_stopping_patience: int = 0
    """So many evaluations without a better loss end the job; 0 never does."""
    suffix: str | None = None
    priority: int = PRIORITY
    """Beside another job it gets device time in proportion to this, 1 to 100."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    started_at: int | None = None
    finished_at: int | None = None
    fine_tuned_model: str | None = None
    step: int = 0
    total_steps: int = 0
    trained_tokens: int = 0
    loss: float | None = None
    valid_loss: float | None = None
    best_step: int | None = None
    """The step whose adapter did best on the validation file, and is the result."""
    error_code: str | None = None
    error_message: str | None = None

    @property
    def download_only(self) -> bool:
        """Whether the adapter can only be downloaded: SGLang serves LoRA and no other method."""
        return self.peft_method != "lora"


@dataclass(frozen=True, slots=True)
class JobEvent:
    id: str
    job_id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    data: Mapping[str, float | int | str] = field(default_factory=dict)


class Serving(Protocol):
    def models(self) -> list[ModelView]: ...
    async def chat(self, call: ChatCall) -> Generation: ...


class FineTuning(Protocol):
    """Lists are newest first; `after` is the id of the last item already seen."""

    async def create_file(self, path: Path, filename: str, purpose: str) -> StoredFile:
        """Validate the upload that lies at `path` and take it over (the caller then deletes nothing)."""
        ...

    async def files(self) -> list[StoredFile]: ...
    async def file(self, file_id: str) -> StoredFile: ...
    async def file_path(self, file_id: str) -> Path: ...
    async def delete_file(self, file_id: str) -> None: ...
    async def create_job(self, spec: JobSpec) -> Job: ...
    async def jobs(self, limit: int = 20, after: str | None = None) -> tuple[list[Job], bool]:
        """Jobs and whether there are more."""
        ...

    async def job(self, job_id: str) -> Job: ...
    async def events(
        self, job_id: str, limit: int = 20, after: str | None = None
    ) -> tuple[list[JobEvent], bool]: ...
    async def cancel_job(self, job_id: str) -> Job: ...
    async def pause_job(self, job_id: str) -> Job: ...
    async def resume_job(self, job_id: str) -> Job: ...
    async def set_priority(self, job_id: str, priority: int) -> Job: ...
    async def adapter_folder(self, job_id: str) -> Path:
        """Where the finished adapter of a job lies, in PEFT's format."""
        ...


class Operations(Protocol):
    def ready(self) -> bool:
        """Whether requests are served now."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Serve the adapter in `folder` under `name`, in the place of one that had it."""
        ...

    async def unload_adapter(self, name: str) -> None: ...
    async def delete_model(self, name: str) -> None:
        """Delete the adapter of that name, which a job has made; requests in flight on it finish."""
        ...

    async def status(self) -> Status: ...
    def timeline(self, since: int) -> Timeline: ...
    async def change_policy(self, change: PolicyChange) -> Status: ...


class AppliancePort(Serving, Operations, Protocol):
    """Everything the API needs."""

    @property
    def finetuning(self) -> FineTuning: ...
