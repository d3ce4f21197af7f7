"""What a chat request may ask beside text: choices, log-probabilities, formats, and values out of range."""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import BaseModel

from harli_appliance.api.ports import Logprob, TextDelta
from harli_appliance.errors import EngineFault
from tests.fakes import BASE, FakeAppliance

HELLO = [{"role": "user", "content": "Say hello"}]


async def test_sampling_values_reach_the_appliance(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    await client.chat.completions.create(
        model=BASE,
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=-1.5,
        presence_penalty=1.5,
        seed=-3,
        extra_body={
            "top_k": 7,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "stop_token_ids": [4, 5],
            "min_tokens": 3,
        },
    )
    call = port.calls[0]
    assert (call.temperature, call.top_p, call.top_k, call.min_p, call.seed) == (0.5, 0.9, 7, 0.05, -3)
    assert (call.frequency_penalty, call.presence_penalty, call.repetition_penalty) == (-1.5, 1.5, 1.2)
    assert (call.stop_token_ids, call.min_tokens, call.ignore_eos) == ((4, 5), 3, False)
    assert (call.n, call.logprobs, call.json_schema) == (1, None, None)


# -- choices -------------------------------------------------------------------------------------------------

TWO = [
    TextDelta("a", 1, choice=0),
    TextDelta("x", 2, choice=1),
    TextDelta("b", 1, "length", choice=0),
    TextDelta("", 1, "stop", choice=1),
]


async def test_choices_come_by_index_and_usage_counts_them_all(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    port.deltas = TWO
    answer = await client.chat.completions.create(model=BASE, messages=HELLO, n=2)
    assert port.calls[0].n == 2
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "ab", "length"),
        (1, "x", "stop"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 5)


async def test_streamed_choices_interleave_by_index(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    port.deltas = TWO
    stream = await client.chat.completions.create(
        model=BASE, messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    pieces = [(c.choices[0].index, c.choices[0].delta.content) for c in chunks if c.choices]
    assert pieces == [(0, ""), (1, ""), (0, "a"), (1, "x"), (0, "b"), (0, None), (1, None)]
    ends = {c.choices[0].index: c.choices[0].finish_reason for c in chunks if c.choices}
    assert ends == {0: "length", 1: "stop"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_without_an_end_is_a_fault(
    client: openai.AsyncOpenAI, port: FakeAppliance, stream: bool
) -> None:
    port.deltas = TWO[:3]

    async def read() -> None:
        answer = await client.chat.completions.create(model=BASE, messages=HELLO, n=2, stream=stream)
        if isinstance(answer, openai.AsyncStream):
            async for _ in answer:
                pass

    with pytest.raises(openai.APIError, match="ended before it was complete"):
        await read()
    assert port.generations[0].aborts == 1


async def test_a_failing_choice_fails_the_answer(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    port.deltas, port.failure = TWO[:2], EngineFault("the step failed")
    with pytest.raises(openai.InternalServerError, match="the step failed"):
        await client.chat.completions.create(model=BASE, messages=HELLO, n=2)
    assert port.generations[0].aborts == 1


# -- log-probabilities ---------------------------------------------------------------------------------------

HALF = Logprob(b"\xc3", -0.5, (Logprob(b"\xc3", -0.5), Logprob(b"hi", -2.25)))


async def test_logprobs_have_openais_shape(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    port.deltas = [
        TextDelta("é", 2, logprobs=(HALF, Logprob(b"\xa9", -0.25))),
        TextDelta("!", 1, "stop", logprobs=(Logprob(b"!", -9999.0),)),
    ]
    answer = await client.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, top_logprobs=2)
    assert port.calls[0].logprobs == 2
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(e.token, e.bytes, e.logprob) for e in content] == [
        ("\ufffd", [0xC3], -0.5),
        ("\ufffd", [0xA9], -0.25),
        ("!", [33], -9999.0),
    ]
    assert bytes(b for e in content for b in e.bytes or ()).decode() == answer.choices[0].message.content
    assert [(t.token, t.bytes, t.logprob) for t in content[0].top_logprobs] == [
        ("\ufffd", [0xC3], -0.5),
        ("hi", [104, 105], -2.25),
    ]
    stream = await client.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, stream=True)
    assert port.calls[1].logprobs == 0
    streamed = [
        entry
        async for chunk in stream
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert [entry.logprob for entry in streamed] == [-0.5, -0.25, -9999.0]


async def test_without_asking_there_are_no_logprobs(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    answer = await client.chat.completions.create(model=BASE, messages=HELLO, logprobs=False)
    assert (answer.choices[0].logprobs, port.calls[0].logprobs) == (None, None)


# -- formats -------------------------------------------------------------------------------------------------


class Otter(BaseModel):
    name: str
    age: int


async def test_schemas_reach_the_appliance_with_their_order(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    port.deltas = [TextDelta('{"name": "Ö", "age": 3}', 9, "stop")]
    answer = await client.chat.completions.parse(model=BASE, messages=HELLO, response_format=Otter)
    assert answer.choices[0].message.parsed == Otter(name="Ö", age=3)
    schema = json.loads(port.calls[0].json_schema or "")
    assert list(schema["properties"]) == ["name", "age"]
    assert schema["additionalProperties"] is False
    await client.chat.completions.create(model=BASE, messages=HELLO, response_format={"type": "json_object"})
    assert json.loads(port.calls[1].json_schema or "") == {"type": "object"}
    await client.chat.completions.create(model=BASE, messages=HELLO, response_format={"type": "text"})
    assert port.calls[2].json_schema is None


# -- refusals ------------------------------------------------------------------------------------------------

SCHEMA = {"name": "x", "schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 2.5}, "repetition_penalty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": SCHEMA}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "schema": []}}},
            "response_format.json_schema.schema",
        ),
    ],
)
async def test_values_out_of_range_are_refused_by_name(
    client: openai.AsyncOpenAI, port: FakeAppliance, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=BASE, messages=HELLO, extra_body=fields)
    assert caught.value.param == param
    assert port.calls == []
