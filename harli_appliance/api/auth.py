"""Bearer authentication: which keys open the API, and of which class their requests are.

Does not know what the keys protect, except the two open probes.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Middleware

from harli_appliance.api.errors import Handler
from harli_appliance.config import Settings
from harli_appliance.errors import AuthenticationError
from harli_appliance.schema import SloClass

OPEN_PATHS = frozenset({"/health", "/ready"})


CLASS_OF_KEY = web.RequestKey("class_of_key", str)
"""The class of requests with this key, for those that name none."""


def keys_of(settings: Settings) -> dict[str, SloClass]:
    """Every key that opens the API, with its class; empty where none is needed."""
    server, slo = settings.server, settings.slo
    keys: dict[str, SloClass] = {}
    if server.api_key is not None:
        keys[server.api_key.get_secret_value()] = "standard"
    keys |= {key.get_secret_value(): "interactive" for key in slo.interactive.api_keys}
    keys |= {key.get_secret_value(): "batch" for key in slo.batch.api_keys}
    return keys


def bearer_middleware(keys: Mapping[str, SloClass]) -> Middleware:
    """A middleware that lets only requests with one of these keys through."""
    known = [(key.encode(), slo_class) for key, slo_class in keys.items()]

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            given = token.strip().encode("utf-8", "surrogateescape")
            # Every key is compared, so that the time taken does not tell which one was nearly right.
            found = [slo_class for key, slo_class in known if hmac.compare_digest(given, key)]
            if scheme.lower() != "bearer" or not found:
                raise AuthenticationError("send the appliance's key as 'Authorization: Bearer KEY'")
            request[CLASS_OF_KEY] = found[0]
        return await handler(request)

    return authenticate
