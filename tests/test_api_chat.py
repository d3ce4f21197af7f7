"""Chat completions: OpenAI's shapes, refusals, and clients that go away."""

from __future__ import annotations

import asyncio
import io
import json

import aiohttp
import openai
import pytest

from harli_appliance.errors import EngineFault, NotFound, Overloaded
from tests.fakes import BASE, FakeAppliance, listening, words

HELLO = [{"role": "user", "content": "Say hello"}]


async def refused(http: aiohttp.ClientSession, **fields: object) -> dict[str, object]:
    body = {"model": BASE, "messages": HELLO, **fields}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 400, await response.text()
        assert response.headers["x-request-id"].startswith("req_")
        return (await response.json())["error"]


async def test_plain_answer(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    answer = await client.chat.completions.create(
        model=BASE, messages=HELLO, temperature=0.3, stop="END", max_completion_tokens=9, user="me", n=1
    )
    assert answer.choices[0].message.content == "Hello world!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        7,
        4,
        11,
    )
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    call = port.calls[0]
    assert (call.temperature, call.stop, call.max_tokens, call.top_p) == (0.3, ("END",), 9, 1.0)
    assert call.messages[0] == {"role": "user", "content": "Say hello"}


async def test_streamed_answer_begins_with_the_role_and_ends_with_usage(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.chat.completions.create(
        model=BASE, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-2]] == ["Hello", " ", "world", "!"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stream_ends_with_done_and_has_no_usage_unless_asked(http: aiohttp.ClientSession) -> None:
    body = {"model": BASE, "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["x-request-id"].startswith("req_")
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event[6:]) for event in events[:-2])


async def test_sampling_extensions_and_falsy_values_are_not_mistaken_for_absent(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    await client.chat.completions.create(
        model=BASE,
        messages=HELLO,
        temperature=0,
        seed=0,
        stop=["a", "b"],
        extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True},
    )
    call = port.calls[0]
    assert (call.temperature, call.seed, call.stop) == (0.0, 0, ("a", "b"))
    assert (call.top_k, call.min_p, call.ignore_eos) == (5, 0.1, True)


async def test_text_parts_are_joined_and_an_answer_can_be_sent_back(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    answer = await client.chat.completions.create(model=BASE, messages=HELLO)
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "are you?"}]
    await client.chat.completions.create(
        model=BASE,
        messages=[
            {"role": "developer", "content": "Be brief"},
            answer.choices[0].message,  # type: ignore[list-item]
            {"role": "user", "content": parts},  # type: ignore[misc,list-item]
        ],
    )
    assert [dict(m) for m in port.calls[1].messages] == [
        {"role": "system", "content": "Be brief"},
        {"role": "assistant", "content": "Hello world!"},
        {"role": "user", "content": "How are you?"},
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("logit_bias", {"50": 1}),
        ("tool_choice", "required"),
        ("store", True),
        ("reasoning_effort", "low"),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    http: aiohttp.ClientSession, field: str, value: object
) -> None:
    error = await refused(http, **{field: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert field in str(error["message"])


async def test_harmless_fields_are_accepted(http: aiohttp.ClientSession) -> None:
    body = {
        "model": BASE,
        "messages": HELLO,
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "n": 1,
        "tools": [],
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logprobs": False,
        "seed": None,
    }
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    ("tier", "slo_class", "answered"),
    [
        (None, "standard", "default"),
        ("auto", "standard", "default"),
        ("default", "standard", "default"),
        ("priority", "interactive", "priority"),
        ("flex", "batch", "flex"),
    ],
)
async def test_a_service_tier_chooses_the_class(
    http: aiohttp.ClientSession, port: FakeAppliance, tier: str | None, slo_class: str, answered: str
) -> None:
    body = {"model": BASE, "messages": HELLO, "service_tier": tier}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert (await response.json())["service_tier"] == answered
    assert port.calls[-1].slo_class == slo_class
    async with http.post("/v1/chat/completions", json={**body, "stream": True}) as response:
        *chunks, _, _ = (await response.text()).split("\n\n")
    assert {json.loads(chunk[6:])["service_tier"] for chunk in chunks} == {answered}


async def test_a_tier_that_is_not_known_is_refused(http: aiohttp.ClientSession) -> None:
    assert (await refused(http, service_tier="scale"))["param"] == "service_tier"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop": ["a", "x" * 1001]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [1] * 2001}, "messages"),  # they are not looked at
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
        ({"model": None}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)
async def test_wrong_values_are_refused_and_named(
    http: aiohttp.ClientSession, port: FakeAppliance, fields: dict[str, object], param: str
) -> None:
    error = await refused(http, **fields)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in str(error["message"])
    assert port.calls == []


async def test_other_kinds_of_content_are_refused(http: aiohttp.ClientSession) -> None:
    image = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    error = await refused(http, messages=[{"role": "user", "content": image}])
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages.0.content.1.type")


async def test_an_unknown_field_gets_the_nearest_name(http: aiohttp.ClientSession) -> None:
    error = await refused(http, temprature=1.0)
    assert error["code"] == "unknown_parameter"
    assert error["param"] == "temprature"
    assert "did you mean 'temperature'?" in str(error["message"])


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_does_not_decompress_is_not_to_be_sent_again(
    http: aiohttp.ClientSession, encoding: str
) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    for _ in range(2):  # the first leaves no broken connection behind
        async with http.post(
            "/v1/chat/completions", data=b"{} is not compressed", headers=headers
        ) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "invalid_body"


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"{", "line 1 column 2"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": Infinity}', "Infinity"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"[1]", "object"),
        (b"", "line 1"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
async def test_invalid_json(http: aiohttp.ClientSession, raw: bytes, word: str) -> None:
    headers = {"Content-Type": "application/json"}
    async with http.post("/v1/chat/completions", data=raw, headers=headers) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["code"] == "invalid_json"
    assert word in error["message"]


async def test_a_number_too_large_for_a_float_is_refused(http: aiohttp.ClientSession) -> None:
    raw = json.dumps({"model": BASE, "messages": HELLO, "temperature": 1}).replace(": 1}", ": 1e999}")
    headers = {"Content-Type": "application/json"}
    async with http.post("/v1/chat/completions", data=raw, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "temperature"


async def test_wrong_content_type_and_huge_body(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", data=b"{}") as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_content_type"
    huge = io.BytesIO(b'{"model": "' + b"x" * (17 << 20) + b'"}')
    headers = {"Content-Type": "application/json"}
    async with http.post("/v1/chat/completions", data=huge, headers=headers) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_a_full_queue_says_when_to_come_back(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    port.refusal = Overloaded("the queue is full", retry_after_s=2.4)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model=BASE, messages=HELLO)
    assert caught.value.response.headers["Retry-After"] == "3"
    assert caught.value.code == "queue_full"


async def test_refusals_of_the_appliance_keep_their_status_in_a_stream(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    port.refusal = NotFound("no model 'x'", code="model_not_found", param="model")
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="x", messages=HELLO, stream=True)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_before_it_is_ready_it_says_so(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    port.is_ready = False
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=BASE, messages=HELLO)
    assert caught.value.status_code == 503
    assert port.calls == []


async def test_failure_before_the_first_token_has_a_status(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    port.deltas, port.failure = [], EngineFault("the step failed")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=BASE, messages=HELLO, stream=True)
    assert "the step failed" in caught.value.message


async def test_failure_in_the_middle_of_a_stream_is_an_event_without_done(
    client: openai.AsyncOpenAI, http: aiohttp.ClientSession, port: FakeAppliance
) -> None:
    port.deltas, port.failure = words("Hel", finish=None), EngineFault("the step failed")
    stream = await client.chat.completions.create(model=BASE, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the step failed"):
        async for _ in stream:
            pass
    body = {"model": BASE, "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as response:
        text = await response.text()
    assert '"Hel"' in text
    assert "[DONE]" not in text


async def test_an_unexpected_fault_is_not_shown_to_the_client(
    http: aiohttp.ClientSession, port: FakeAppliance
) -> None:
    port.refusal = RuntimeError("secret detail")
    body = {"model": BASE, "messages": HELLO}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 500
        assert "secret" not in await response.text()
        assert response.headers["x-request-id"] in await response.text()


async def test_an_answer_without_an_end_is_a_fault(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    port.deltas = words("Hel", finish=None)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=BASE, messages=HELLO)
    assert caught.value.code == "generation_aborted"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_aborts_its_generation(
    url: str, port: FakeAppliance, stream: bool
) -> None:
    port.hold_at = 1
    async with aiohttp.ClientSession(url) as session:
        body = {"model": BASE, "messages": HELLO, "stream": stream}
        asking = asyncio.create_task(session.post("/v1/chat/completions", json=body))
        await port.holding.wait()
        asking.cancel()
        await asyncio.wait([asking])
    await asyncio.wait_for(port.generations[0].aborted_midway.wait(), 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_flight_when_the_server_stops_ends_with_an_error(
    port: FakeAppliance, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("harli_appliance.api.chat.GRACE_S", 0.1)
    port.hold_at = 1
    async with listening(port) as listener, aiohttp.ClientSession(listener.url) as session:
        body = {"model": BASE, "messages": HELLO, "stream": stream}
        asking = asyncio.create_task(session.post("/v1/chat/completions", json=body))
        await port.holding.wait()
        stopping = asyncio.create_task(listener.close())
        async with asyncio.timeout(5):
            response = await asking
            last = (await response.text()).removesuffix("\n\n").rpartition("data: ")[2]
            await stopping
    assert json.loads(last)["error"]["code"] == "generation_aborted"


async def test_an_answer_in_flight_when_the_server_stops_may_end(port: FakeAppliance) -> None:
    port.queue = asyncio.Event()
    async with listening(port) as listener, aiohttp.ClientSession(listener.url) as session:
        asking = asyncio.create_task(
            session.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO})
        )
        await port.in_queue.wait()
        stopping = asyncio.create_task(listener.close())
        await asyncio.sleep(0.05)
        port.queue.set()
        async with asyncio.timeout(5):
            assert (await asking).status == 200
            await stopping


async def test_a_client_that_leaves_while_queued_leaves_the_queue(url: str, port: FakeAppliance) -> None:
    port.queue = asyncio.Event()
    async with aiohttp.ClientSession(url) as session:
        asking = asyncio.create_task(
            session.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO})
        )
        await port.in_queue.wait()
        asking.cancel()
        await asyncio.wait([asking])
    await asyncio.wait_for(port.left_queue.wait(), 5)


async def test_a_finished_answer_is_not_aborted_midway(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    await client.chat.completions.create(model=BASE, messages=HELLO)
    assert not port.generations[0].aborted_midway.is_set()
