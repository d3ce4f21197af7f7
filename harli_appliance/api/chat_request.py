"""The body of a chat completion: what is used, what is harmless, what is refused.

Knows OpenAI's fields and the extra sampling values of vLLM and SGLang (top_k, min_p, repetition_penalty,
stop_token_ids, min_tokens, ignore_eos). Does not know who answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from harli_appliance.api.bodies import ANY, Body, contradiction, unsupported
from harli_appliance.api.ports import ChatCall
from harli_appliance.api.response_format import ResponseFormat
from harli_appliance.schema import SloClass

MAX_MESSAGES = 2000
MAX_STOPS = 4
MAX_STOP_LENGTH = 1000
"""Characters of a stop string: the runtime tokenizes it between two steps, and looks for it in every answer."""
MAX_STOP_TOKENS = 64
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
CLASS_OF_TIER: Mapping[str, SloClass] = {"default": "standard", "priority": "interactive", "flex": "batch"}
"""OpenAI's service tiers as classes of ours; ``auto`` leaves it to the key."""
TIER_OF_CLASS: Mapping[SloClass, str] = {slo_class: tier for tier, slo_class in CLASS_OF_TIER.items()}

Value = TypeVar("Value")


def _or(value: Value | None, default: Value) -> Value:
    """The value, or the default when the caller sent null or nothing (0 is a value)."""
    return default if value is None else value


class ChatMessage(Body):
    """One turn. Content may be a list of text parts, which are joined; other kinds of part are refused."""

    neutral: ClassVar[Mapping[str, object]] = {
        # What the openai client sends back when an answer of ours is appended to the messages.
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "tool_calls": ([],),
        "tool_call_id": (),
        "name": (),
        "reasoning_content": (),
    }

    role: str
    content: str

    @field_validator("role")
    @classmethod
    def _role(cls, role: str) -> str:
        if role in ("tool", "function"):
            raise unsupported(f"the role '{role}' is not supported; use system, user or assistant")
        if role == "developer":
            return "system"  # OpenAI's newer word for it
        if role not in ("system", "user", "assistant"):
            raise ValueError("use system, developer, user or assistant")
        return role

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: object) -> object:
        if content is None:
            raise ValueError("it must be text")
        if not isinstance(content, list):
            return content
        texts = []
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
                raise ValueError('each part must be {"type": "text", "text": "..."}')
            if kind != "text":
                raise unsupported(f"content of type '{kind}' is not supported; only text is", index, "type")
            if set(part) != {"type", "text"} or not isinstance(part["text"], str):
                raise ValueError('each part must be {"type": "text", "text": "..."}')
            texts.append(part["text"])
        return "".join(texts)


class StreamOptions(Body):
    neutral: ClassVar[Mapping[str, object]] = {"include_obfuscation": (False,)}

    include_usage: bool = False


class ChatRequest(Body):
    """``POST /v1/chat/completions``."""

    neutral: ClassVar[Mapping[str, object]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
        # Notes of the caller to itself, or hints that a cache may use: no answer depends on them.
        "metadata": ANY,
        "parallel_tool_calls": ANY,
        "prompt_cache_key": ANY,
        "safety_identifier": ANY,
        "user": ANY,
    }

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = (
        None
    )
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _countable(cls, messages: object) -> object:
        # Before anything looks at each of them: a body may hold hundreds of thousands.
        if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
            raise ValueError(f"there are {len(messages)}; send {MAX_MESSAGES} at most")
        return messages

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _short_stops(cls, stops: list[str] | None) -> list[str] | None:
        for stop in stops or ():
            if len(stop) > MAX_STOP_LENGTH:
                raise ValueError(f"a string has {len(stop)} characters; use {MAX_STOP_LENGTH} at most")
        return stops

    @field_validator("top_k")
    @classmethod
    def _top_k(cls, top_k: int | None) -> int | None:
        if top_k == 0:
            raise ValueError("use -1 for no limit, or at least 1")
        return top_k

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise contradiction("'stream_options' needs stream=true", "stream_options")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise contradiction("'max_tokens' and 'max_completion_tokens' differ; give one", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise contradiction("'top_logprobs' needs logprobs=true", "top_logprobs")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def choices(self) -> int:
        return _or(self.n, 1)

    def call(self, class_of_key: SloClass) -> ChatCall:
        """What the appliance is asked, with OpenAI's defaults filled in.

        Args:
            class_of_key: of requests that name no tier.
        """
        return ChatCall(
            model=self.model,
            messages=tuple({"role": m.role, "content": m.content} for m in self.messages),
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=_or(self.top_k, -1),
            min_p=_or(self.min_p, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            seed=self.seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=_or(self.min_tokens, 0),
            n=self.choices,
            logprobs=_or(self.top_logprobs, 0) if self.logprobs else None,
            slo_class=CLASS_OF_TIER.get(self.service_tier or "auto", class_of_key),
            json_schema=None if self.response_format is None else self.response_format.schema_text,
        )
