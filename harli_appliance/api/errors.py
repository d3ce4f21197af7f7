"""Every failure in OpenAI's error shape, and a request id on every response.

Knows how an error becomes a response. Does not know who raises it. The `openai` client retries 409, 429 and
5xx by itself: 429 and 503 therefore say when, and a 409 says that it is of no use.
"""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from harli_appliance.api.wire import ErrorDetail
from harli_appliance.errors import (
    ApplianceUnavailable,
    AuthenticationError,
    Conflict,
    DatasetError,
    HarliError,
    NotReady,
    Overloaded,
    UsageError,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)

log = structlog.get_logger(__name__)


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HarliError as error:
        if error.status >= 500 and not isinstance(error, NotReady):  # whoever waits asks every second
            log.warning("request failed", request_id=request_id(request), path=request.path, error=str(error))
        return error_response(error)
    except web.HTTPException as refusal:
        return _refusal_response(request, refusal)
    except web.RequestPayloadError:
        response = error_response(
            UsageError(
                "the body is broken; send it whole and encoded as its headers say", code="invalid_body"
            )
        )
        response.force_close()  # nobody knows where the next request begins
        return response
    except ConnectionResetError:
        raise  # the client left: there is nobody to tell
    except Exception:
        log.exception("unexpected error", request_id=request_id(request), path=request.path)
        return error_response(unexpected(request))


def unexpected(request: web.Request) -> HarliError:
    """What a person is told of a fault of ours: the id under which the log has the rest."""
    return HarliError(f"internal error; the appliance's log has it under {request_id(request)}")


def request_id(request: web.Request) -> str:
    if REQUEST_ID not in request:
        request[REQUEST_ID] = f"req_{uuid.uuid4().hex}"
    return request[REQUEST_ID]


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal `on_response_prepare`: the only place that sees every response, streamed ones too."""
    response.headers["x-request-id"] = request_id(request)


def error_detail(error: HarliError) -> dict[str, object]:
    """The value of ``{"error": ...}``."""
    detail = ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    if isinstance(error, DatasetError):
        detail.findings = [_finding(finding) for finding in error.findings]
    body = detail.model_dump(mode="json")
    if detail.findings is None:
        del body["findings"]
    return body


def _finding(finding: object) -> dict[str, object]:
    if dataclasses.is_dataclass(finding) and not isinstance(finding, type):
        return dataclasses.asdict(finding)
    return {"message": str(finding)}


def error_response(error: HarliError) -> web.Response:
    response = web.json_response({"error": error_detail(error)}, status=error.status)
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, ApplianceUnavailable):
        response.headers["Retry-After"] = "1"
    elif isinstance(error, Conflict):
        response.headers["x-should-retry"] = "false"
    elif isinstance(error, AuthenticationError):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _refusal_response(request: web.Request, refusal: web.HTTPException) -> web.StreamResponse:
    """What aiohttp itself refuses: unknown path, wrong method, a body that is too large."""
    if refusal.status < 400:
        raise refusal
    allow = refusal.headers.get("Allow")
    messages = {
        404: (f"{request.method} {request.path} does not exist; docs/api.md lists the routes", "unknown_url"),
        405: (f"{request.path} does not take {request.method}, only {allow}", "method_not_allowed"),
        413: ("the body is too large; send less", "body_too_large"),
    }
    message, code = messages.get(refusal.status, (refusal.reason, "invalid_request"))
    detail = ErrorDetail(message=message, type="invalid_request_error", code=code)
    headers = {"Allow": allow} if allow else {}
    body = {"error": detail.model_dump(mode="json", exclude={"findings"})}
    response = web.json_response(body, status=refusal.status, headers=headers)
    if refusal.status == 413:
        response.force_close()  # the rest of the body is still on its way
    return response
