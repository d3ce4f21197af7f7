"""The body of a new fine-tuning job, in OpenAI's shape with our hyperparameters beside theirs.

Knows what OpenAI's clients send, in the current form (``method.supervised.hyperparameters``, or ``dpo``) and the
older one (``hyperparameters`` at the top). Does not know the defaults: "auto" and nothing both mean the
appliance's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, get_args

from pydantic import Field, field_validator, model_validator

from harli_appliance.api.bodies import Body, contradiction, unsupported
from harli_appliance.api.ports import JobSpec
from harli_appliance.schema import LearningRateSchedule, PeftMethod, TargetModule, TrainingMethod


class HyperparametersBody(Body):
    """The word "auto" stands for the appliance's default.

    OpenAI's learning_rate_multiplier scales a rate that OpenAI keeps to itself; here the rate itself is said.
    """

    n_epochs: Annotated[int, Field(ge=1, le=100)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    learning_rate_multiplier: object = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    lora_rank: Annotated[int, Field(ge=1, le=256)] | None = None
    lora_alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    use_rslora: bool | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=0.9)] | None = None
    peft_method: PeftMethod | None = None
    target_modules: Annotated[list[TargetModule], Field(min_length=1)] | None = None
    lr_scheduler_type: LearningRateSchedule | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] | None = None
    eval_steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    early_stopping_patience: Annotated[int, Field(ge=0, le=1000)] | None = None

    @field_validator("learning_rate_multiplier")
    @classmethod
    def _no_multiplier(cls, value: object) -> object:
        if value not in (None, "auto"):
            raise unsupported("'learning_rate_multiplier' is not supported; give 'learning_rate', e.g. 2e-4")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _auto(cls, value: object) -> object:
        return None if value == "auto" else value


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class DpoHyperparametersBody(HyperparametersBody):
    beta: Annotated[float, Field(gt=0, le=2)] | None = None


class DpoBody(Body):
    hyperparameters: DpoHyperparametersBody | None = None


class MethodBody(Body):
    neutral: ClassVar[Mapping[str, object]] = {"reinforcement": ()}

    type: str
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None

    @field_validator("type")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind == "reinforcement":
            raise unsupported(f"the method '{kind}' is not supported; use 'supervised' or 'dpo'")
        if kind not in get_args(TrainingMethod):
            raise ValueError("use 'supervised' or 'dpo'")
        return kind

    @model_validator(mode="after")
    def _of_its_type(self) -> MethodBody:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise contradiction(f"the type is '{self.type}'; leave '{other}' out, or change the type", other)
        return self

    def chosen(self) -> HyperparametersBody | None:
        body = self.dpo if self.type == "dpo" else self.supervised
        return None if body is None else body.hyperparameters


class PriorityBody(Body):
    """``POST /harli/v1/jobs/{id}/priority``."""

    priority: Annotated[int, Field(ge=1, le=100)]


class JobBody(Body):
    """``POST /v1/fine_tuning/jobs``."""

    neutral: ClassVar[Mapping[str, object]] = {"integrations": ([],)}

    model: Annotated[str, Field(min_length=1)]
    training_file: Annotated[str, Field(min_length=1)]
    validation_file: Annotated[str, Field(min_length=1)] | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    priority: Annotated[int, Field(ge=1, le=100)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _one_place(self) -> JobBody:
        if self.hyperparameters is not None and self.method is not None:
            raise contradiction("give 'method' or the older 'hyperparameters', not both", "hyperparameters")
        return self

    def spec(self) -> JobSpec:
        chosen = self.hyperparameters
        if self.method is not None:
            chosen = self.method.chosen()
        values: dict[str, Any] = {
            name: value
            for name, value in (chosen or HyperparametersBody())
            if name != "learning_rate_multiplier"
        }
        if values["target_modules"] is not None:
            values["target_modules"] = tuple(values["target_modules"])
        return JobSpec(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed,
            priority=self.priority,
            metadata=self.metadata or {},
            method="dpo" if self.method is not None and self.method.type == "dpo" else "supervised",
            **values,
        )
