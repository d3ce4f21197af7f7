"""One tree of errors: each has an HTTP status, an OpenAI error code and an exit code.

    HarliError
    +-- UsageError               400  exit 2   the caller asked for something that cannot be
    |   +-- UnsupportedParameter 400  exit 2   a known field that this appliance does not implement
    |   +-- DatasetError         400  exit 1   a training file is malformed (carries every finding)
    +-- ConfigError              500  exit 2   harli.toml, environment or flags are wrong
    +-- AuthenticationError      401  exit 1
    +-- NotFound                 404  exit 1
    +-- Conflict                 409  exit 1   the state of the thing forbids it; retrying will not help
    +-- Overloaded               429  exit 1   the queue is full; retry after a while
    +-- ApplianceUnavailable     503  exit 3   not started or unreachable
    |   +-- NotReady             503  exit 3   it answers, but does not serve: starting or stopping
    +-- JobFailed                500  exit 4   a finetuning job ended without an adapter
    +-- EngineFault              500  exit 1   the runtime failed while serving a request
    +-- PartitionsUnavailable    500  exit 1   the GPU cannot be split between the lanes; they take turns instead

Messages are one line and say what to do. This module knows no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class HarliError(Exception):
    """Base of every error that a person may see.

    Args:
        message: one line, saying what is wrong and what to do.
        code: a stable machine-readable word; defaults to the class's own.
        param: the request field or setting at fault, if one is.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param


class UsageError(HarliError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"
    exit_code = 2


class UnsupportedParameter(UsageError):
    default_code = "unsupported_parameter"


class ConfigError(HarliError):
    type = "invalid_request_error"
    default_code = "invalid_configuration"
    exit_code = 2


class DatasetError(UsageError):
    """A training file is refused; `findings` holds one entry per fault."""

    default_code = "invalid_training_file"
    exit_code = 1

    def __init__(self, message: str, *, code: str | None = None, findings: Sequence[object] = ()) -> None:
        super().__init__(message, code=code, param="file")
        self.findings = tuple(findings)


class AuthenticationError(HarliError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class NotFound(HarliError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class Conflict(HarliError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class Overloaded(HarliError):
    """The request queue is full; `retry_after_s` is what the client is told to wait."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ApplianceUnavailable(HarliError):
    status = 503
    type = "server_error"
    default_code = "unavailable"
    exit_code = 3


class NotReady(ApplianceUnavailable):
    default_code = "not_ready"


class JobFailed(HarliError):
    default_code = "job_failed"
    exit_code = 4


class EngineFault(HarliError):
    default_code = "engine_fault"


class PartitionsUnavailable(HarliError):
    default_code = "no_partitions"
