"""Bearer authentication. Knows one key; does not know what it protects, except the two open probes."""

from __future__ import annotations

import hmac

from aiohttp import web
from aiohttp.typedefs import Middleware

from harli_appliance.api.errors import Handler
from harli_appliance.errors import AuthenticationError

OPEN_PATHS = frozenset({"/health", "/ready"})


def bearer_middleware(api_key: str) -> Middleware:
    """A middleware that lets only requests with this key through."""
    expected = api_key.encode()

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            given = token.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, expected):
                raise AuthenticationError("send the appliance's key as 'Authorization: Bearer KEY'")
        return await handler(request)

    return authenticate
