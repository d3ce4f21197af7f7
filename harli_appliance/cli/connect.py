"""From a command to the appliance: where it is, with which key, and one event loop for the conversation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from harli_appliance.client import HarliClient

Result = TypeVar("Result")

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="HARLI_URL",
        metavar="URL",
        help="Where the appliance listens; server.host and server.port of harli.toml when not given.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - listened on, not connected to


def connect(url: str | None) -> HarliClient:
    """A client for the appliance that flags, environment and harli.toml point to."""
    import os

    from harli_appliance.client import HarliClient

    api_key = os.environ.get("HARLI_API_KEY")
    if url is None or api_key is None:
        from harli_appliance.config import load_settings

        server = load_settings().server
        if url is None:
            from harli_appliance.errors import UsageError

            if server.port == 0:
                raise UsageError("harli.toml asks for any free port; say with --url which one it became")
            url = f"http://{EVERYWHERE.get(server.host, server.host)}:{server.port}"
        if api_key is None and server.api_key is not None:
            api_key = server.api_key.get_secret_value()
    return HarliClient(url, api_key)


def talk(url: str | None, work: Callable[[HarliClient], Awaitable[Result]]) -> Result:
    """Do `work` with a client, on an event loop of its own."""
    import asyncio

    async def conversation() -> Result:
        async with connect(url) as client:
            return await work(client)

    return asyncio.run(conversation())


async def base_model(client: HarliClient) -> str:
    """The name of the model that the appliance serves without an adapter."""
    from harli_appliance.errors import NotFound

    for model in await client.models():
        if model.harli.kind == "base":
            return model.id
    raise NotFound("the appliance serves no model yet; 'harli status' says what it does")
