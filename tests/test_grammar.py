"""Answers that must satisfy a JSON schema: a model with random weights, sampled hot, cannot break it."""

from __future__ import annotations

import json
from concurrent.futures import Future
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from harli_appliance.errors import UsageError
from harli_appliance.runtime.grammar import LONGEST_SCHEMA, check_json_schema
from harli_appliance.runtime.protocol import Sampling, Submission
from tests.conftest import Serving
from tests.test_runtime import greedy, prompt, serve, tokens_of


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Fish(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)

    kind: Literal["fish"]
    length: Annotated[int, Field(ge=1, le=99)]


class Otter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=12)]
    colour: Colour
    weight: float
    tame: bool
    eats: Annotated[list[Fish], Field(max_length=3)]
    note: Annotated[str, Field(max_length=5)] | None


def texts(serving: Serving, schema: dict[str, Any], seeds: range, max_tokens: int = 900) -> list[str]:
    submissions = [
        Submission(
            f"json-{seed}",
            prompt(800 + seed, 10),
            Sampling(max_tokens, temperature=1.0, seed=seed, json_schema=json.dumps(schema)),
        )
        for seed in seeds
    ]
    brought = serve(serving, submissions, every=3)
    assert {items[-1].finish for items in brought.values()} == {"stop"}
    tokenizer = serving.runtime.scheduler.tokenizer
    return [tokenizer.decode(tokens_of(items)[:-1]) for items in brought.values()]


def test_every_answer_satisfies_its_schema(serving: Serving) -> None:
    for text in texts(serving, Otter.model_json_schema(), range(6)):
        Otter.model_validate_json(text)


def test_any_object_is_an_object(serving: Serving) -> None:
    submission = Submission(
        "object", prompt(810, 10), Sampling(40, 1.0, seed=1, json_schema='{"type": "object"}')
    )
    answer = tokens_of(serve(serving, [submission])["object"])
    assert serving.runtime.scheduler.tokenizer.decode(answer).lstrip().startswith("{")


def test_constrained_and_free_requests_share_a_batch(serving: Serving, reference: Any) -> None:
    schema = json.dumps({"enum": ["a" * 8, "b" * 8]})
    free = Submission("free", prompt(811, 12), Sampling(30, ignore_eos=True))
    bound = Submission("bound", prompt(812, 12), Sampling(40, 1.0, seed=2, json_schema=schema, logprobs=3))
    brought = serve(serving, [free, bound])
    assert tokens_of(brought["free"]) == greedy(reference, list(free.prompt), 30)
    text = serving.runtime.scheduler.tokenizer.decode(tokens_of(brought["bound"])[:-1])
    assert TypeAdapter(str).validate_json(text) in ("a" * 8, "b" * 8)
    reported = [entry for item in brought["bound"] for entry in item.logprobs]
    assert len(reported) == len(tokens_of(brought["bound"]))
    # What the schema forbids is not offered as an alternative: nothing has probability zero.
    assert all(value > -100 for entry in reported for _, value in entry.top)
    assert max(len(entry.top) for entry in reported) == 2


def test_white_space_comes_to_an_end(serving: Serving) -> None:
    """The tiny model likes some white space so much that it would never stop: the grammar makes it."""
    assert texts(serving, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, range(4), 120)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems"),
        ({"$ref": "https://example.com/schema"}, "does not fetch"),
        ({"description": "x" * LONGEST_SCHEMA}, "characters"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_json_schema(json.dumps(schema))
    assert caught.value.param == "response_format"
    assert "\n" not in caught.value.message


# -- while a grammar is compiled -----------------------------------------------------------------------------


@pytest.fixture
def slow_compiler(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Future[Any]:
    """Compilation that ends when the test says so."""
    compiled: Future[Any] = Future()
    backend = serving.runtime.scheduler.grammar_manager.grammar_backend
    monkeypatch.setattr(backend, "get_cached_or_future_value", lambda key, reasoning: (compiled, False))
    return compiled


def test_a_request_that_waits_for_its_grammar_is_counted_and_holds_nobody_up(
    serving: Serving, slow_compiler: Future[Any]
) -> None:
    schema = '{"enum": ["yes"]}'

    def run() -> None:
        runtime = serving.runtime
        runtime.submit(Submission("bound", prompt(820, 10), Sampling(20, 1.0, json_schema=schema)))
        runtime.submit(Submission("free", prompt(821, 10), Sampling(6, ignore_eos=True)))
        assert runtime.depth().waiting == 2
        assert serving.slots.demand() >= 10 + 20 + 10 + 6
        # How long each plan may wait for the compiler while others decode.
        assert runtime.scheduler.grammar_manager.SGLANG_GRAMMAR_POLL_INTERVAL <= 0.001
        finished = []
        for _ in range(6):
            plan = runtime.plan()
            assert plan is not None
            assert plan.requests == ("free",)
            finished += [item.finish for item in runtime.execute(plan).tokens]
        assert finished[-1] == "length"
        assert runtime.depth().waiting == 1
        assert runtime.plan() is None
        backend = runtime.scheduler.grammar_manager.grammar_backend
        slow_compiler.set_result(backend.dispatch_json(schema))
        text = []
        while (plan := runtime.plan()) is not None:
            text += [token for item in runtime.execute(plan).tokens for token in item.tokens]
        assert runtime.scheduler.tokenizer.decode(text[:-1]) == '"yes"'

    serving.lane.submit(run).result()


def test_a_request_that_waits_for_its_grammar_can_be_aborted(
    serving: Serving, slow_compiler: Future[Any]
) -> None:
    def run() -> list[Any]:
        runtime = serving.runtime
        runtime.submit(Submission("bound", prompt(822, 200), Sampling(20, 1.0, json_schema="{}")))
        assert runtime.plan() is None
        runtime.abort("bound")
        ends = [*runtime.drain()]
        if (plan := runtime.plan()) is not None:
            ends += runtime.execute(plan).tokens
        ends += runtime.drain()
        assert runtime.depth() == type(runtime.depth())(0, 0)
        assert serving.slots.counts().serving == 0
        assert runtime.plan() is None
        return ends

    (end,) = serving.lane.submit(run).result()
    assert (end.request, end.finish, end.tokens) == ("bound", "abort", ())
