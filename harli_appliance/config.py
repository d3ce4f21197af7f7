"""Settings: one typed tree from flags, environment, ``harli.toml`` and defaults, in that order.

Knows where settings come from and what they mean. Does not know torch, HTTP or SQL. An unknown key is
refused with the nearest valid name; every setting carries the sentence shown in the reference.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from harli_appliance.errors import ConfigError
from harli_appliance.scheduling.names import DEFAULT_POLICY, POLICY_NAMES
from harli_appliance.schema import JobOrder, PolicyName

CONFIG_FILE = "harli.toml"
T = TypeVar("T", "StepLimits", "Promise", "Sizes")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Section):
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8321, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        None,
        description="When set, every request but those for /health and /ready must carry it, or the key of a "
        "class, as a bearer token.",
    )
    max_queued_requests: int = Field(256, ge=1, description="Requests waiting beyond this are answered 429.")
    max_upload_mib: int = Field(512, ge=1, description="Largest file that can be uploaded, in MiB.")


def _set_or(section: Section, usual: T) -> T:
    """What is set in a section, and for the rest what is usual."""
    names = (field.name for field in fields(usual))
    return replace(usual, **{name: value for name in names if (value := getattr(section, name)) is not None})


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Of a serving step: prompt tokens, and requests that are decoded together."""

    chunked_prefill_tokens: int
    max_running_requests: int


CPU_LIMITS = StepLimits(128, 32)
GPU_LIMITS = StepLimits(2048, 256)
"""A step reads the weights whatever it computes; with 128 tokens a GPU would wait for memory all the time."""


class ModelSettings(Section):
    path: str = Field(
        "smollm2-135m-instruct",
        description="A Hugging Face folder, or the name of a model that `harli models` lists.",
    )
    served_name: str | None = Field(
        None,
        description="Name in the API; the folder's name when not set. Jobs and adapters belong to this name: "
        "those of another one wait until it is served again.",
    )
    context_length: int | None = Field(
        None,
        ge=16,
        description="Longest prompt plus answer in tokens; when not set the model's own, "
        "or its attention window if SGLang does not apply that.",
    )
    chunked_prefill_tokens: int | None = Field(
        None,
        ge=16,
        description="A prompt is processed at most this many tokens a step. "
        f"{CPU_LIMITS.chunked_prefill_tokens} on a CPU and {GPU_LIMITS.chunked_prefill_tokens} on a GPU when "
        "not set.",
    )
    max_running_requests: int | None = Field(
        None,
        ge=1,
        description="Requests decoded together at most. "
        f"{CPU_LIMITS.max_running_requests} on a CPU and {GPU_LIMITS.max_running_requests} on a GPU when not set.",
    )

    def limits(self, *, gpu: bool) -> StepLimits:
        """What is set, and for the rest what suits the device."""
        return _set_or(self, GPU_LIMITS if gpu else CPU_LIMITS)


_KEYS = "API keys whose requests are of this class when they do not name one; they open the API too."


@dataclass(frozen=True, slots=True)
class Promise:
    """Time per output token, and to the first one."""

    tpot_ms: float
    ttft_ms: float


CPU_PROMISE, GPU_PROMISE = Promise(250.0, 10_000.0), Promise(50.0, 2_000.0)
CPU_INTERACTIVE, GPU_INTERACTIVE = Promise(150.0, 3_000.0), Promise(30.0, 1_000.0)
CPU_BATCH, GPU_BATCH = Promise(1_000.0, 60_000.0), Promise(250.0, 20_000.0)
"""What is promised is what people get while a job runs: training is given the rest."""


class InteractiveSlo(Section):
    tpot_ms: float | None = Field(
        None,
        gt=0,
        description='Of class interactive (`service_tier: "priority"`); when not set 150, on a GPU 30.',
    )
    ttft_ms: float | None = Field(
        None, gt=0, description="Of class interactive; when not set 3,000, on a GPU 1,000."
    )
    api_keys: tuple[SecretStr, ...] = Field((), description=_KEYS)

    def promise(self, *, gpu: bool) -> Promise:
        """What is set, and for the rest what suits the device."""
        return _set_or(self, GPU_INTERACTIVE if gpu else CPU_INTERACTIVE)


class BatchSlo(Section):
    tpot_ms: float | None = Field(
        None, gt=0, description='Of class batch (`service_tier: "flex"`); when not set 1,000, on a GPU 250.'
    )
    ttft_ms: float | None = Field(
        None, gt=0, description="Of class batch; when not set 60,000, on a GPU 20,000."
    )
    api_keys: tuple[SecretStr, ...] = Field((), description=_KEYS)

    def promise(self, *, gpu: bool) -> Promise:
        """What is set, and for the rest what suits the device."""
        return _set_or(self, GPU_BATCH if gpu else CPU_BATCH)


class SloSettings(Section):
    tpot_ms: float | None = Field(
        None,
        gt=0,
        description="Promised time per output token of a request, in milliseconds; of class standard, to which "
        "requests belong that say nothing. When not set 250, on a GPU 50.",
    )
    ttft_ms: float | None = Field(
        None,
        gt=0,
        description="Promised time to the first token, in milliseconds; when not set 10,000, on a GPU 2,000.",
    )
    interactive: InteractiveSlo = InteractiveSlo()
    batch: BatchSlo = BatchSlo()

    def promise(self, *, gpu: bool) -> Promise:
        """What is set, and for the rest what suits the device."""
        return _set_or(self, GPU_PROMISE if gpu else CPU_PROMISE)


class SchedulingSettings(Section):
    policy: PolicyName = Field(
        DEFAULT_POLICY,
        description="How serving and training share the device.",
        json_schema_extra={"enum": list(POLICY_NAMES)},
    )
    calibration: Literal["first_start", "always", "never"] = Field(
        "first_start",
        description="When to measure steps before serving, for some 20 seconds: at the first start with this "
        "model on this device, at every start, or never. Without it, training waits beside requests until "
        "enough of them were served.",
    )
    bound_quantile: float = Field(
        0.99, gt=0.5, lt=1.0, description="Share of steps that must stay under the predicted bound."
    )


class MemorySettings(Section):
    pool_slots: int | None = Field(
        None,
        ge=256,
        description="KV-cache slots (tokens) that serving and training share; when not set 16,384, on a GPU as "
        "many as 80% of its free memory hold beside the weights.",
    )
    watermark: float = Field(0.1, ge=0.0, lt=1.0, description="Share of the pool that training never leases.")
    keep_cached: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the pool up to which training leaves unused prefix-cache entries alone: 0 lets it "
        "drop them all, 1 none. Kept entries make prompts with a known beginning faster; dropping them lets "
        "training go on in a full pool.",
    )
    keep_free: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="Share of the pool that stays free when training keeps outputs of its forward pass in slots "
        "that nobody needs, which spares it a quarter of its work; serving takes them back first. 1 keeps none.",
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of a work unit, and of a micro-batch."""

    window_tokens: int
    sequence_tokens: int


CPU_SIZES = Sizes(128, 512)
GPU_SIZES = Sizes(1024, 2048)
"""A unit reads its layer's weights whatever its tokens; with 128 a GPU would do little else."""


class TrainingSettings(Section):
    enabled: bool = Field(True, description="Whether jobs are run at all.")
    order: JobOrder = Field(
        "fair",
        description="How running jobs share the device: fair, in proportion to their priorities, or fifo, "
        "one after the other.",
    )
    max_running_jobs: int = Field(
        4, ge=1, le=64, description="Jobs that run at a time; each holds its adapter and optimizer in memory."
    )
    max_lora_rank: int = Field(16, ge=1, le=256, description="Largest LoRA rank that can be served.")
    max_adapters: int = Field(4, ge=1, le=64, description="Adapters that one batch can mix.")
    window_tokens: int | None = Field(
        None,
        ge=8,
        description="Tokens of one work unit: smaller yields sooner, larger is faster. "
        f"{CPU_SIZES.window_tokens} on a CPU and {GPU_SIZES.window_tokens} on a GPU when not set.",
    )
    sequence_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens of one micro-batch; short examples are packed up to this. "
        f"{CPU_SIZES.sequence_tokens} on a CPU and {GPU_SIZES.sequence_tokens} on a GPU when not set.",
    )
    checkpoint_every_steps: int = Field(
        10, ge=1, description="Optimizer steps between two checkpoints of a running job."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept for a job.")
    fused_kernels: bool = Field(
        True,
        description="Whether finetuning on a GPU takes liger-kernel's norms and cross-entropy and torch's "
        "variable-length attention, where they are installed and give the same numbers.",
    )

    def sizes(self, *, gpu: bool) -> Sizes:
        """What is set, and for the rest what suits the device."""
        return _set_or(self, GPU_SIZES if gpu else CPU_SIZES)


class DeviceSettings(Section):
    kind: Literal["auto", "cpu", "cuda"] = Field("auto", description="What to compute on.")
    inference_cores: tuple[int, ...] | None = Field(
        None, description="CPU cores of the inference lane; half of the allowed ones when not set."
    )
    training_cores: tuple[int, ...] | None = Field(
        None, description="CPU cores of the training lane; the other half when not set."
    )
    attention: str | None = Field(
        None,
        description="SGLang's attention backend on a GPU, e.g. triton; SGLang's own choice when not set.",
    )
    graphs: bool = Field(
        True,
        description="Whether a GPU decodes with CUDA graphs, which are captured at start for every partition.",
    )


class LoggingSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level shown.")
    json_lines: bool = Field(False, description="Write logs as JSON lines.")


def default_home() -> Path:
    """``HARLI_HOME``, or the user's data folder (XDG)."""
    if home := os.environ.get("HARLI_HOME"):
        return Path(home).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "harli"


class Settings(BaseSettings):
    """The whole tree. Build it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="HARLI_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    home: Path = Field(
        default_factory=default_home,
        description="Everything the appliance keeps: database, files, adapters, converted models.",
    )
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    slo: SloSettings = SloSettings()
    scheduling: SchedulingSettings = SchedulingSettings()
    memory: MemorySettings = MemorySettings()
    training: TrainingSettings = TrainingSettings()
    device: DeviceSettings = DeviceSettings()
    logging: LoggingSettings = LoggingSettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))

    # -- where things are kept -------------------------------------------------------------------

    @property
    def database(self) -> Path:
        return self.home / "harli.db"

    @property
    def files(self) -> Path:
        return self.home / "files"

    @property
    def adapters(self) -> Path:
        return self.home / "adapters"

    @property
    def uploads(self) -> Path:
        """Where uploads lie while they arrive."""
        return self.home / "uploads"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    @property
    def models(self) -> Path:
        return self.home / "models"


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """``["server.port=0"]`` as ``{"server": {"port": "0"}}``, for `load_settings`, which reads texts as what each
    setting is; lists, objects and quoted texts are JSON.

    Raises:
        ConfigError: one of them assigns nothing, or to something inside a value.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set '{assignment}' sets nothing; write e.g. --set memory.pool_slots=8192")
        *sections, name = key.strip().split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set '{assignment}': '{section}' has a value already")
        place[name] = _value(text)
    return tree


def _value(text: str) -> Any:
    if text[:1] in ("[", "{", '"'):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def load_settings(config: Path | None = None, /, **flags: Any) -> Settings:
    """Read the settings.

    Args:
        config: a TOML file; when None, ``harli.toml`` of the working directory if there is one.
        flags: nested overrides, e.g. ``server={"port": 0}``; they win over everything.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; one line that says what to do.
    """
    path = config or Path(CONFIG_FILE)
    if config is not None and not config.is_file():
        raise ConfigError(f"{config}: no such file; write one or leave --config out", param="config")

    class FileSettings(Settings):
        model_config = SettingsConfigDict(**{**Settings.model_config, "toml_file": path})

    _check_variables()
    try:
        return FileSettings(**flags)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Dotted names of every setting, e.g. ``server.port``."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _check_variables() -> None:
    """
    Raises:
        ConfigError: a variable of the environment names a section that there is none of; pydantic passes over it.
    """
    for variable in os.environ:
        section, separator, _ = variable.lower().removeprefix("harli_").partition("__")
        if variable.upper().startswith("HARLI_") and separator and section not in Settings.model_fields:
            key = variable.lower().removeprefix("harli_").replace("__", ".")
            raise ConfigError(f"{variable} in the environment: {_unknown(key)}")


def _unknown(key: str) -> str:
    names = setting_names()
    near = difflib.get_close_matches(key, names + [n.split(".")[0] for n in names], n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "docs/configuration.md lists the valid ones"
    return f"unknown setting '{key}': {hint}"


def _explain(error: ValidationError, path: Path) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    source = f"{path}: " if path.is_file() else ""
    if first["type"] == "extra_forbidden":
        return f"{source}{_unknown(key)}"
    return f"{source}setting '{key}' is wrong: {first['msg']} (got {first['input']!r})"
