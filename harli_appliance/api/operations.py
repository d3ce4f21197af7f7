"""Probes, metrics and ``/harli/v1``: what the appliance says about itself, and the policy it can be given.

Knows the wire types of `schema`. Does not know how the numbers come about.
"""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import Field

from harli_appliance.api.bodies import Body, Query, read_body, read_query
from harli_appliance.api.metrics import exposition
from harli_appliance.api.ports import Operations
from harli_appliance.errors import NotReady
from harli_appliance.schema import PolicyChange, PolicyName


class TimelineQuery(Query):
    since: Annotated[int, Field(ge=0)] = 0


class PolicyBody(Body):
    policy: PolicyName | None = None
    slo_tpot_ms: Annotated[float, Field(gt=0)] | None = None
    slo_ttft_ms: Annotated[float, Field(gt=0)] | None = None


class OperationsRoutes:
    def __init__(self, port: Operations) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/metrics", self.metrics),
            web.get("/harli/v1/status", self.status),
            web.get("/harli/v1/timeline", self.timeline),
            web.post("/harli/v1/policy", self.policy),
        ]

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        if not self._port.ready():
            raise NotReady("the appliance does not serve yet; ask again")
        return web.json_response({"status": "ready"})

    async def metrics(self, request: web.Request) -> web.Response:
        body = exposition(await self._port.status())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def status(self, request: web.Request) -> web.Response:
        status = await self._port.status()
        return web.json_response(text=status.model_dump_json())

    async def timeline(self, request: web.Request) -> web.Response:
        query = read_query(request, TimelineQuery)
        return web.json_response(text=self._port.timeline(query.since).model_dump_json())

    async def policy(self, request: web.Request) -> web.Response:
        body = await read_body(request, PolicyBody)
        status = await self._port.change_policy(PolicyChange(**dict(body)))
        return web.json_response(text=status.model_dump_json())
