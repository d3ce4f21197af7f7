"""Reading what a request carries: JSON bodies and query strings, validated, with faults named as OpenAI does.

Knows pydantic and aiohttp's request; does not know what the fields mean. Three kinds of field:
fields of a model are used, fields in its `neutral` table are accepted only with a value that changes nothing,
every other field is refused with the nearest valid name. Nothing is ever silently ignored.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar, get_args

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from harli_appliance.errors import UnsupportedParameter, UsageError

ANY = object()
"""In a `neutral` table: whatever the value, it asks nothing of this appliance."""

UNSUPPORTED = "unsupported_parameter"
CONTRADICTION = "contradiction"


class Body(BaseModel):
    """Base of request bodies: strict types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    neutral: ClassVar[Mapping[str, object]] = {}
    """Fields that OpenAI has and we do not: the tuple of values that ask for nothing, or `ANY`."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept, unknown = {}, 0
        for name, value in data.items():
            if name not in cls.neutral:
                unknown += name not in known
                if unknown <= 1:  # one is enough to refuse the body, which may hold hundreds of thousands
                    kept[name] = value
            elif value is not None and not _asks_nothing(value, cls.neutral[name]):
                raise unsupported(f"'{name}' is not supported; leave it out", name)
        return kept


class Query(Body):
    """Base of query strings: the same rules, with numbers written as text."""

    model_config = ConfigDict(strict=False)


AnyBody = TypeVar("AnyBody", bound=Body)


def _asks_nothing(value: object, allowed: object) -> bool:
    if allowed is ANY:
        return True
    # type() as well, for True == 1 and 1.0 == 1 in Python.
    return isinstance(allowed, tuple) and any(value == a and type(value) is type(a) for a in allowed)


def unsupported(message: str, *path: str | int) -> PydanticCustomError:
    """The error to raise inside a validator for something known but not implemented."""
    return PydanticCustomError(UNSUPPORTED, "{message}", {"message": message, "path": path})


def contradiction(message: str, *path: str | int) -> PydanticCustomError:
    """The error to raise inside a validator when fields do not fit each other."""
    return PydanticCustomError(CONTRADICTION, "{message}", {"message": message, "path": path})


async def read_body(request: web.Request, model: type[AnyBody]) -> AnyBody:
    """The request's JSON body as `model`.

    Raises:
        UsageError: not JSON, not an object, or a field is wrong; names the field.
    """
    if request.content_type != "application/json":
        raise UsageError(
            f"the body is {request.content_type}; send JSON with Content-Type: application/json",
            code="invalid_content_type",
        )
    return validate(model, parse_json(await request.read()))


def read_query(request: web.Request, model: type[AnyBody]) -> AnyBody:
    return validate(model, dict(request.query))


def parse_json(raw: bytes) -> dict[str, Any]:
    try:
        # 'inf' also arises from 1e999, which is legal JSON: the models refuse it where a number is meant.
        data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in raw:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid_json("it holds half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise _invalid_json(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise _invalid_json("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError as error:
        raise _invalid_json(str(error).split(";")[0]) from None
    if not isinstance(data, dict):
        raise _invalid_json(f"it must be an object, not {type(data).__name__}")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _invalid_json(reason: str) -> UsageError:
    return UsageError(f"the body is not valid JSON: {reason}", code="invalid_json")


def validate(model: type[AnyBody], data: object) -> AnyBody:
    """`data` as `model`, or the first fault as a `UsageError` with `param` set."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(model, error.errors()[0]) from None


def _explain(model: type[Body], fault: ErrorDetails) -> UsageError:
    context = fault.get("ctx", {})
    path = [str(part) for part in (*fault["loc"], *context.get("path", ()))]
    param = ".".join(path)
    if fault["type"] == UNSUPPORTED:
        return UnsupportedParameter(context["message"], param=param)
    if fault["type"] == CONTRADICTION:
        return UsageError(context["message"], param=param)
    if fault["type"] == "extra_forbidden":
        places = dict(_names(model))
        near = difflib.get_close_matches(path[-1], sorted(places), n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else "leave it out"
        if path[-1] in places:
            hint = f"write it as '{places[path[-1]]}'"
        return UsageError(f"unknown parameter '{param}': {hint}", code="unknown_parameter", param=param)
    if fault["type"] == "missing":
        return UsageError(f"'{param}' is required", code="missing_parameter", param=param)
    message = fault["msg"].removeprefix("Value error, ")
    return UsageError(f"'{param}' is wrong: {message} (got {_short(fault['input'])})", param=param)


def _short(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _names(model: type[Body], place: str = "") -> Iterator[tuple[str, str]]:
    """Every parameter, and where it stands; the outermost place of a name comes last."""
    for name, field in model.model_fields.items():
        for kind in _types(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Body):
                yield from _names(kind, f"{place}{name}.")
    for name in (*model.neutral, *model.model_fields):
        yield name, place + name


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)
