"""The JSON shapes of OpenAI's API as this appliance speaks them: one definition for server and clients.

Knows field names only. A client that reads them ignores fields it does not know, so that an older command
line can talk to a newer appliance. Times are seconds since the epoch.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from harli_appliance.schema import JobStatus, LearningRateSchedule, PeftMethod, TrainingMethod

Item = TypeVar("Item")


class WireObject(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ListOf(WireObject, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Deleted(WireObject):
    id: str
    object: str
    deleted: bool = True


class ErrorDetail(WireObject):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    findings: list[dict[str, object]] | None = None
    """Our extension: what is wrong with an uploaded training file, one entry per fault."""


class ModelHarli(WireObject):
    kind: Literal["base", "adapter"]
    parent: str | None = None
    job: str | None = None


class ModelObject(WireObject):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "harli"
    harli: ModelHarli
    """Our extension: what kind of model it is and where it came from."""


class PromptTokensDetails(WireObject):
    cached_tokens: int = 0


class Usage(WireObject):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=PromptTokensDetails)


class AssistantMessage(WireObject):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class TopLogprob(WireObject):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(WireObject):
    content: list[TokenLogprob]
    refusal: None = None


class Choice(WireObject):
    index: int = 0
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(WireObject):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    service_tier: str | None = None
    system_fingerprint: str | None = None


class Delta(WireObject):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(WireObject):
    index: int = 0
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(WireObject):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None


class FileObject(WireObject):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None


class JobError(WireObject):
    code: str
    message: str
    param: str | None = None


class Hyperparameters(WireObject):
    """OpenAI's three, of which the multiplier always stays "auto", and ours, which say the rate itself."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: Literal["auto"] = "auto"
    learning_rate: float
    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    peft_method: PeftMethod
    target_modules: list[str]
    lr_scheduler_type: LearningRateSchedule
    warmup_ratio: float
    max_grad_norm: float
    eval_steps: int
    early_stopping_patience: int


class SupervisedMethod(WireObject):
    hyperparameters: Hyperparameters


class DpoHyperparameters(Hyperparameters):
    beta: float


class DpoMethod(WireObject):
    hyperparameters: DpoHyperparameters


class Method(WireObject):
    """One of `supervised` and `dpo` is there, the one that `type` names."""

    type: TrainingMethod
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None


class JobProgress(WireObject):
    step: int
    total_steps: int
    trained_tokens: int
    loss: float | None = None
    valid_loss: float | None = None
    best_step: int | None = None
    started_at: int | None = None
    priority: int = 10
    download_only: bool = False
    """Whether the adapter cannot be served, only downloaded."""


class JobObject(WireObject):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str = "harli"
    status: JobStatus
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = Field(default_factory=list)
    trained_tokens: int | None = None
    """None until the job has ended, as in OpenAI's API; `harli.trained_tokens` counts along."""
    error: JobError | None = None
    estimated_finish: int | None = None
    hyperparameters: Hyperparameters
    method: Method
    seed: int
    integrations: list[str] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict)
    harli: JobProgress
    """Our extension: progress while it runs."""


class JobEventObject(WireObject):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, float | int | str] = Field(default_factory=dict)
