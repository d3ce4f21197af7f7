"""Listening: one socket for one application.

Knows the operating system's refusals and what to do about each. Does not know what is served.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from aiohttp import web

from harli_appliance.errors import ConfigError

GRACE_S = 1.0
"""How long other requests may go on when the server stops and answers have ended; aiohttp waits as long again
after it has cancelled them."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A server that accepts requests at `url` until `close`."""

    runner: web.AppRunner
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def close(self) -> None:
        await self.runner.cleanup()


async def serve(app: web.Application, host: str, port: int) -> Listener:
    """Start listening; port 0 takes a free one, and the listener says which.

    Raises:
        ConfigError: the address cannot be had; nothing is left half-started.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=GRACE_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except (OSError, UnicodeError) as error:
        await runner.cleanup()
        raise ConfigError(_refusal(error, host, port), param="server.port") from error
    return Listener(runner, host, int(runner.addresses[0][1]))


def _refusal(error: Exception, host: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what listens there or choose another with --port"
    if number == errno.EACCES:
        return f"port {port} needs more rights than this user has; choose one above 1023 with --port"
    if number == errno.EADDRNOTAVAIL or isinstance(error, (socket.gaierror, UnicodeError)):
        return f"{host} is not an address of this machine; choose another with --host"
    return f"cannot listen on {host}:{port}: {error}"
