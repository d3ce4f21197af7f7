"""The client that command line, dashboard and demo share: arrival times, and errors as they were over there."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import ValidationError

from harli_appliance.client import HarliClient, StreamedText, StreamEnd, _unpack
from harli_appliance.errors import (
    ApplianceUnavailable,
    AuthenticationError,
    Conflict,
    DatasetError,
    EngineFault,
    HarliError,
    NotFound,
    Overloaded,
    UnsupportedParameter,
    UsageError,
)
from harli_appliance.schema import PolicyChange, Status
from tests.fakes import BASE, FakeAppliance, listening, make_status, words

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(port: FakeAppliance) -> AsyncIterator[HarliClient]:
    async with listening(port) as listener, HarliClient(f"{listener.url}/v1") as client:
        yield client


async def test_a_stream_carries_arrival_times_and_its_end(client: HarliClient) -> None:
    events = [event async for event in client.stream_chat(BASE, HELLO, max_tokens=8)]
    texts = [event for event in events if isinstance(event, StreamedText)]
    assert "".join(event.text for event in texts) == "Hello world!"
    assert [event.at for event in texts] == sorted(event.at for event in texts)
    end = events[-1]
    assert isinstance(end, StreamEnd)
    assert (end.finish_reason, end.usage.completion_tokens) == ("stop", 4)


async def test_a_plain_answer(client: HarliClient) -> None:
    answer = await client.chat(BASE, HELLO, temperature=0)
    assert answer.choices[0].message.content == "Hello world!"


async def test_a_stream_that_breaks_off_is_a_fault(client: HarliClient, port: FakeAppliance) -> None:
    port.deltas, port.failure = words("Hel", finish=None), EngineFault("the step failed")
    with pytest.raises(EngineFault, match="the step failed"):
        async for _ in client.stream_chat(BASE, HELLO):
            pass


async def test_leaving_a_stream_early_aborts_the_answer(client: HarliClient, port: FakeAppliance) -> None:
    port.hold_at = 2
    stream = client.stream_chat(BASE, HELLO)
    await anext(stream)
    await stream.aclose()
    await asyncio.wait_for(port.generations[0].aborted_midway.wait(), 5)


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", retry_after_s=4),
        NotFound("no such model", code="model_not_found", param="model"),
        Conflict("no"),
        UsageError("too long", param="messages"),
        UnsupportedParameter("not that", param="n"),
        ApplianceUnavailable("stopping"),
        EngineFault("broken"),
    ],
)
async def test_errors_come_out_as_they_went_in(
    client: HarliClient, port: FakeAppliance, error: HarliError
) -> None:
    port.refusal = error
    with pytest.raises(type(error), match=error.message) as caught:
        await client.chat(BASE, HELLO)
    assert type(caught.value) is type(error)
    assert (caught.value.code, caught.value.param) == (error.code, error.param)
    if isinstance(caught.value, Overloaded):
        assert caught.value.retry_after_s == 4


async def test_files_and_jobs(client: HarliClient, port: FakeAppliance, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n")
    file = await client.upload(path)
    assert [f.id for f in await client.files()] == [file.id]
    job = await client.create_job(BASE, file.id, suffix="x", n_epochs=2, lora_rank=None)
    assert (port.specs[0].n_epochs, port.specs[0].lora_rank, job.hyperparameters.n_epochs) == (2, None, 2)
    port.update(job.id, step=4, loss=1.5)
    assert ((await client.job(job.id)).harli.step, (await client.jobs()).data[0].harli.loss) == (4, 1.5)
    assert (await client.set_priority(job.id, 20)).harli.priority == 20
    assert (await client.pause_job(job.id)).status == "paused"
    assert (await client.resume_job(job.id)).status == "queued"
    assert (await client.cancel_job(job.id)).status == "cancelled"
    assert (await client.delete_file(file.id)).deleted
    with pytest.raises(NotFound, match=r"no job '\.\./files'"):
        await client.job("../files")
    path.write_text("broken")
    with pytest.raises(DatasetError) as caught:
        await client.upload(path)
    assert caught.value.findings[0] == {"line": 3, "code": "invalid_json", "message": "line 3: no JSON"}
    with pytest.raises(UsageError, match="cannot be read"):
        await client.upload(tmp_path / "none.jsonl")


async def test_state(client: HarliClient, port: FakeAppliance) -> None:
    assert await client.ready()
    assert (await client.status()) == port.status_now
    assert (await client.timeline(6)).next == 8
    assert (await client.change_policy(PolicyChange(policy="serve_only"))).policy == "serve_only"
    assert port.changes == [PolicyChange(policy="serve_only")]
    assert "harli_uptime_seconds" in await client.metrics()
    port.is_ready = False
    assert not await client.ready()
    with pytest.raises(ApplianceUnavailable, match="did not become ready"):
        await client.wait_ready(0.05)


async def test_a_key(port: FakeAppliance) -> None:
    async with listening(port, api_key="k") as listener:
        async with HarliClient(listener.url, "k") as client:
            assert len(await client.models()) == 2
        async with HarliClient(listener.url, "wrong") as client:
            with pytest.raises(AuthenticationError):
                await client.models()


async def test_another_server_is_told_from_an_appliance() -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>Hello</html>", content_type="text/html")

    async def others(request: web.Request) -> web.Response:
        model = {"id": "gpt", "object": "model", "created": 1, "owned_by": "another"}
        return web.json_response({"object": "list", "data": [model]})

    app = web.Application()
    app.router.add_get("/harli/v1/status", page)
    app.router.add_get("/v1/fine_tuning/jobs", page)
    app.router.add_get("/v1/models", others)
    app.router.add_post("/harli/v1/policy", others)
    async with TestServer(app) as server, HarliClient(str(server.make_url("/"))) as client:
        for call in (
            client.status,
            client.jobs,
            client.models,
            partial(client.change_policy, PolicyChange()),
        ):
            with pytest.raises(ApplianceUnavailable, match=rf"127\.0\.0\.1:{server.port} .* check --url"):
                await call()


def test_what_a_newer_appliance_tells_besides_is_no_fault() -> None:
    told = json.loads(make_status().model_dump_json())
    told["weather"] = told["serving"]["weather"] = "fine"
    assert Status.model_validate(told) == make_status()
    with pytest.raises(ValidationError, match="weather"):
        PolicyChange.model_validate({"policy": "adaptive", "weather": "fine"})


async def test_nobody_there() -> None:
    async with HarliClient("http://127.0.0.1:9") as client:
        assert not await client.ready()
        with pytest.raises(
            ApplianceUnavailable, match=r"http://127\.0\.0\.1:9; start one with 'harli serve'"
        ):
            await client.status()


def test_an_archive_stays_in_its_folder(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("config.json", b"{}"), ("../../evil.txt", b"no")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    file.seek(0)
    _unpack(file, tmp_path / "in" / "job")
    assert sorted(path.name for path in (tmp_path / "in" / "job").iterdir()) == ["config.json", "evil.txt"]
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["evil.txt"]
