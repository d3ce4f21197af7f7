"""From what a person asks for to a job with every value decided, each one checked against its range.

Knows the ranges and the defaults; knows neither files nor the database.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from typing import get_args

from harli_appliance.api.ports import PRIORITY, Job, JobSpec
from harli_appliance.errors import UsageError
from harli_appliance.schema import TARGET_MODULES, LearningRateSchedule, PeftMethod, TrainingMethod
from harli_appliance.store.ids import new_id

N_EPOCHS = 3
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
LORA_RANK = 8
ALPHA_PER_RANK = 2.0
BETA = 0.1
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0
EVAL_STEPS = 10

MAX_EPOCHS = 100
MAX_BATCH_SIZE = 1024
MAX_LORA_ALPHA = 4096.0
MAX_LORA_DROPOUT = 0.9
LARGEST_GRAD_NORM = 1000.0
MAX_PRIORITY = 100
MAX_EVAL_STEPS = 100_000
MAX_PATIENCE = 1000
MAX_BETA = 2.0
MAX_SEED = 2**31 - 1

_SUFFIX = re.compile(r"[a-zA-Z0-9_-]{1,40}")
_MAX_METADATA = 16
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512


def resolve(spec: JobSpec, *, model: str, max_lora_rank: int) -> Job:
    """A new queued job.

    Args:
        model: name of the only model that can be finetuned here.
        max_lora_rank: the largest rank that serving can load.

    Raises:
        UsageError: a value is out of its range; names the field.
    """
    if spec.model != model:
        raise UsageError(
            f"model '{spec.model}' cannot be finetuned here; use '{model}'",
            code="model_not_found",
            param="model",
        )
    rank = spec.lora_rank if spec.lora_rank is not None else min(LORA_RANK, max_lora_rank)
    job = Job(
        id=new_id("ftjob"),
        status="queued",
        model=model,
        training_file=spec.training_file,
        created_at=int(time.time()),
        seed=spec.seed if spec.seed is not None else secrets.randbelow(MAX_SEED + 1),
        n_epochs=spec.n_epochs if spec.n_epochs is not None else N_EPOCHS,
        batch_size=spec.batch_size if spec.batch_size is not None else BATCH_SIZE,
        learning_rate=spec.learning_rate if spec.learning_rate is not None else LEARNING_RATE,
        lora_rank=rank,
        lora_alpha=spec.lora_alpha if spec.lora_alpha is not None else ALPHA_PER_RANK * rank,
        use_rslora=spec.use_rslora or False,
        lora_dropout=spec.lora_dropout or 0.0,
        method=spec.method,
        beta=spec.beta if spec.beta is not None else BETA,
        peft_method=spec.peft_method or "lora",
        target_modules=spec.target_modules if spec.target_modules is not None else TARGET_MODULES,
        lr_scheduler_type=spec.lr_scheduler_type or "cosine",
        warmup_ratio=spec.warmup_ratio if spec.warmup_ratio is not None else WARMUP_RATIO,
        max_grad_norm=spec.max_grad_norm if spec.max_grad_norm is not None else MAX_GRAD_NORM,
        validation_file=spec.validation_file,
        eval_steps=spec.eval_steps if spec.eval_steps is not None else EVAL_STEPS,
        early_stopping_patience=spec.early_stopping_patience or 0,
        suffix=spec.suffix,
        priority=spec.priority if spec.priority is not None else PRIORITY,
        metadata=dict(spec.metadata),
    )
    check_priority(job.priority)
    _between("seed", job.seed, 0, MAX_SEED)
    _between("n_epochs", job.n_epochs, 1, MAX_EPOCHS)
    _between("batch_size", job.batch_size, 1, MAX_BATCH_SIZE)
    _between("lora_rank", job.lora_rank, 1, max_lora_rank)
    _above_zero("learning_rate", job.learning_rate, 1.0)
    _above_zero("lora_alpha", job.lora_alpha, MAX_LORA_ALPHA)
    _between("eval_steps", job.eval_steps, 1, MAX_EVAL_STEPS)
    _between("early_stopping_patience", job.early_stopping_patience, 0, MAX_PATIENCE)
    for name in ("eval_steps", "early_stopping_patience"):
        if getattr(spec, name) and spec.validation_file is None:
            raise UsageError(f"{name} has a meaning with a validation_file only; leave it out", param=name)
    _one_of("method", job.method, get_args(TrainingMethod))
    _above_zero("beta", job.beta, MAX_BETA)
    if spec.beta is not None and job.method != "dpo":
        raise UsageError("beta has a meaning for the method dpo only; leave it out", param="beta")
    _one_of("peft_method", job.peft_method, get_args(PeftMethod))
    _check_targets(job)
    if job.peft_method == "ia3":
        _refuse_lora_options(spec)
    _from_zero("lora_dropout", job.lora_dropout, MAX_LORA_DROPOUT)
    _from_zero("warmup_ratio", job.warmup_ratio, 1.0)
    _from_zero("max_grad_norm", job.max_grad_norm, LARGEST_GRAD_NORM)
    _one_of("lr_scheduler_type", job.lr_scheduler_type, get_args(LearningRateSchedule))
    if job.suffix is not None and _SUFFIX.fullmatch(job.suffix) is None:
        raise UsageError(
            "suffix must be 1 to 40 letters, digits, '-' or '_'; choose another or leave it out",
            param="suffix",
        )
    _check_metadata(job)
    return job


def check_priority(priority: int) -> None:
    """Raises:
    UsageError: there is no such priority.
    """
    _between("priority", priority, 1, MAX_PRIORITY)


def adapter_name(job: Job) -> str:
    """What requests call the adapter of a job, in OpenAI's way of naming."""
    return f"ft:{job.model}:{job.suffix or 'harli'}:{job.id[-8:]}"


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} is {value}; choose {least} to {most}", param=name)


def _above_zero(name: str, value: float, most: float) -> None:
    if not 0 < value <= most:  # refuses NaN too
        raise UsageError(f"{name} is {value}; choose a number above 0, {most:g} at most", param=name)


def _from_zero(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:  # refuses NaN too
        raise UsageError(f"{name} is {value}; choose 0 to {most:g}", param=name)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is '{value}'; choose {', '.join(choices)}", param=name)


def _check_targets(job: Job) -> None:
    for name in job.target_modules:
        _one_of("target_modules", name, TARGET_MODULES)
    if not job.target_modules or len(set(job.target_modules)) < len(job.target_modules):
        raise UsageError(
            "target_modules is empty or names one twice; name each projection once", param="target_modules"
        )


def _refuse_lora_options(spec: JobSpec) -> None:
    for name in ("lora_rank", "lora_alpha", "use_rslora", "lora_dropout"):
        if getattr(spec, name):
            raise UsageError(f"{name} has no meaning for ia3, which has no rank; leave it out", param=name)


def _check_metadata(job: Job) -> None:
    too_long = any(
        len(key) > _MAX_METADATA_KEY or len(value) > _MAX_METADATA_VALUE
        for key, value in job.metadata.items()
    )
    if too_long or len(job.metadata) > _MAX_METADATA:
        raise UsageError(
            f"metadata holds at most {_MAX_METADATA} pairs, keys of {_MAX_METADATA_KEY} characters "
            f"and values of {_MAX_METADATA_VALUE}; shorten it",
            param="metadata",
        )
