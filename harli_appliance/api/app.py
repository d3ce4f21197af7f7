"""The HTTP application: every route around one port.

Knows which routes exist and in which order a request meets auth and error handling. Does not know how
anything is answered, and opens no socket (`server` does).
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Middleware

from harli_appliance.api.adapters import AdapterRoutes
from harli_appliance.api.auth import bearer_middleware, keys_of
from harli_appliance.api.chat import ChatRoutes
from harli_appliance.api.errors import add_request_id, errors_middleware
from harli_appliance.api.files import FileRoutes
from harli_appliance.api.fine_tuning import FineTuningRoutes
from harli_appliance.api.operations import OperationsRoutes
from harli_appliance.api.ports import AppliancePort
from harli_appliance.config import Settings

MAX_BODY = 16 << 20
"""Largest JSON body in bytes; uploads have their own limit (server.max_upload_mib)."""


def create_app(port: AppliancePort, settings: Settings) -> web.Application:
    """The application; serve it with `api.server.serve`: there, a client that leaves cancels its request."""
    middlewares: list[Middleware] = [errors_middleware]
    if keys := keys_of(settings):
        middlewares.append(bearer_middleware(keys))
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY)
    app.on_response_prepare.append(add_request_id)
    app.add_routes(OperationsRoutes(port).routes())
    app.add_routes(AdapterRoutes(port).routes())
    chat = ChatRoutes(port)
    app.on_shutdown.append(chat.finish)
    app.add_routes(chat.routes())
    app.add_routes(FileRoutes(port.finetuning, settings).routes())
    app.add_routes(FineTuningRoutes(port.finetuning).routes())
    return app
