"""Loading and unloading adapters while serving, under vLLM's and SGLang's route names; deleting what a job made.

Knows the two bodies. Does not know what an adapter is made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from aiohttp import web
from pydantic import Field

from harli_appliance.api.bodies import Body, read_body
from harli_appliance.api.ports import Operations
from harli_appliance.api.wire import Deleted

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:/-]+$")]


class LoadBody(Body):
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1)]
    """A folder on the appliance's machine, in PEFT's format."""


class UnloadBody(Body):
    lora_name: Name


class AdapterRoutes:
    def __init__(self, port: Operations) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/load_lora_adapter", self.load),
            web.post("/v1/unload_lora_adapter", self.unload),
            web.delete("/v1/models/{id:.+}", self.delete),
        ]

    async def load(self, request: web.Request) -> web.Response:
        body = await read_body(request, LoadBody)
        await self._port.load_adapter(body.lora_name, Path(body.lora_path))
        return web.json_response({"id": body.lora_name, "status": "loaded"})

    async def unload(self, request: web.Request) -> web.Response:
        body = await read_body(request, UnloadBody)
        await self._port.unload_adapter(body.lora_name)
        return web.json_response({"id": body.lora_name, "status": "unloaded"})

    async def delete(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        await self._port.delete_model(name)
        return web.json_response(Deleted(id=name, object="model").model_dump(mode="json"))
