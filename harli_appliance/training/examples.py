"""What a training example is: a chat whose assistant turns are learned from, or a text that is learned whole.

Knows the rules of one example, in OpenAI's chat format or ``{"text": ...}``; knows nothing of files. Preferences
are in `training/preferences.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from harli_appliance.schema import DataFormat
from harli_appliance.training.strict_json import shown

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)

UNSUPPORTED_KEYS = frozenset({"tools", "functions", "parallel_tool_calls"})
UNSUPPORTED_MESSAGE_KEYS = frozenset({"tool_calls", "tool_call_id", "function_call"})

OTHER_FORMATS: Mapping[str, str] = {
    "prompt": "prompt/completion",
    "completion": "prompt/completion",
    "instruction": "Alpaca",
    "conversations": "ShareGPT",
}
"""Keys that tell which other format a line without messages is in."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` is 1 where its tokens are learned: assistant turns, unless the file says 0."""

    role: Role
    content: str
    weight: Literal[0, 1]


@dataclass(frozen=True, slots=True)
class Example:
    messages: tuple[Message, ...]

    format: ClassVar[DataFormat] = "chat"

    def as_chat(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text of which every token is learned, and its end."""

    text: str

    format: ClassVar[DataFormat] = "text"


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """Two answers to one prompt; each is the whole conversation, of which only the answer has a weight."""

    preferred: Example
    other: Example

    format: ClassVar[DataFormat] = "preference"


AnyExample = Example | TextExample | PreferenceExample


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an example, where its line is known to the caller."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """An example, or the faults that keep it from being one; and what to warn of in both cases."""

    example: AnyExample | None
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]


def judge_chat(value: Mapping[str, Any]) -> Verdict:
    """Check a line with ``messages``, or one that is no format that is known."""
    warnings = [
        Fault("unknown_key", f"the key {shown(key)} is not used; leave it out")
        for key in value
        if key != "messages" and key not in UNSUPPORTED_KEYS
    ]
    faults = [
        Fault("unsupported", f"the key {shown(key)} is not supported: tools cannot be trained; leave it out")
        for key in value
        if key in UNSUPPORTED_KEYS
    ]
    if "messages" not in value:
        return _refused(*faults, _no_messages(value))
    return _judge_messages(value["messages"], faults, warnings)


def _judge_messages(messages: object, faults: list[Fault], warnings: list[Fault]) -> Verdict:
    if not isinstance(messages, list):
        fault = Fault("messages_not_a_list", f"'messages' is {shown(messages)}; write a list of messages")
        return _refused(*faults, fault)
    if not messages:
        return _refused(
            *faults,
            Fault("messages_empty", "'messages' is empty; write at least a user and an assistant turn"),
        )
    turns: list[Message] = []
    for number, message in enumerate(messages, 1):
        wrong = list(_message_faults(message, number))
        faults += wrong
        if not wrong:
            turns.append(_message(message))
        if isinstance(message, dict):
            warnings += _message_warnings(message, number)
    if len(turns) == len(messages):
        faults += _conversation_faults(turns)
        if all(turn.role != "user" for turn in turns):
            warnings.append(Fault("no_user_turn", "no user turn: the model learns to speak unasked"))
    example = None if faults else Example(tuple(turns))
    return Verdict(example, tuple(faults), tuple(warnings))


def judge_text(value: Mapping[str, Any]) -> Verdict:
    """Check a line with ``text``."""
    warnings = tuple(unused_keys(value, {"text"}))
    faults = tuple(text_faults(value["text"], "the text"))
    return Verdict(None if faults else TextExample(value["text"]), faults, warnings)


def unused_keys(value: Mapping[str, Any], known: set[str]) -> Iterator[Fault]:
    for key in value:
        if key not in known:
            yield Fault("unknown_key", f"the key {shown(key)} is not used; leave it out")


def _refused(*faults: Fault) -> Verdict:
    return Verdict(None, faults, ())


def _no_messages(value: Mapping[str, object]) -> Fault:
    for key, name in OTHER_FORMATS.items():
        if key in value:
            return Fault(
                "messages_missing",
                f"no 'messages': this looks like the {name} format; "
                'write {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}',
            )
    return Fault("messages_missing", "no 'messages'; write a list of messages under that key")


def _message_faults(message: object, number: int) -> Iterator[Fault]:
    where = f"message {number}"
    if not isinstance(message, dict):
        yield Fault(
            "message_not_an_object", f"{where} is {shown(message)}; write an object with role and content"
        )
        return
    role = message.get("role")
    if "role" not in message:
        yield Fault("role_missing", f"{where} has no 'role'; write system, user or assistant")
    elif role not in ROLES:
        hint = "write 'system' for it" if role == "developer" else "write system, user or assistant"
        yield Fault("role_unknown", f"{where} has the role {shown(role)}; {hint}")
    for key in sorted(UNSUPPORTED_MESSAGE_KEYS & message.keys()):
        yield Fault("unsupported", f"{where} has '{key}': tools cannot be trained; leave the message out")
    yield from _content_faults(message, where)
    if "weight" in message:
        weight = message["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
            yield Fault(
                "weight_wrong", f"{where} has the weight {shown(weight)}; write 0 or 1, or leave it out"
            )
        elif role in ROLES and role != "assistant":
            yield Fault(
                "weight_on_other_turn",
                f"{where} has a weight but is a {role} turn; only assistant turns are learned",
            )


def _content_faults(message: Mapping[str, Any], where: str) -> Iterator[Fault]:
    if "content" not in message:
        yield Fault("content_missing", f"{where} has no 'content'; write its text")
    else:
        yield from text_faults(message["content"], f"the content of {where}")


def text_faults(content: object, what: str) -> Iterator[Fault]:
    """What keeps a value from being a text to learn from."""
    if content is None:
        yield Fault("content_null", f"{what} is null; write it as a string")
    elif isinstance(content, list):
        yield Fault("content_not_text", f"{what} is a list of parts; write one string, text only")
    elif not isinstance(content, str):
        yield Fault("content_not_text", f"{what} is {shown(content)}; write a string")
    elif not content.strip():
        yield Fault("content_empty", f"{what} is empty; write something, or leave it out")
    elif "\0" in content:
        yield Fault("nul_character", f"{what} holds a NUL character (\\u0000); take it out")
    elif not _encodable(content):
        yield Fault(
            "lone_surrogate",
            f"{what} has half a surrogate pair (\\ud800-\\udfff); write the whole character",
        )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _message_warnings(message: Mapping[str, Any], number: int) -> Iterator[Fault]:
    known = UNSUPPORTED_MESSAGE_KEYS | {"role", "content", "weight"}
    for key in message:
        if key not in known:
            yield Fault("unknown_key", f"the key {shown(key)} of message {number} is not used; leave it out")


def _message(message: Mapping[str, Any]) -> Message:
    role: Role = message["role"]
    learned = role == "assistant" and message.get("weight", 1) == 1
    return Message(role, message["content"], 1 if learned else 0)


def _conversation_faults(turns: list[Message]) -> Iterator[Fault]:
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number > 1:
            yield Fault(
                "system_not_first",
                f"message {number} is a system turn; write one system turn at most, as the first message",
            )
    if all(turn.role != "assistant" for turn in turns):
        yield Fault("no_assistant_turn", "no assistant turn, so there is nothing to learn; add the answer")
        return
    if turns[-1].role != "assistant":
        yield Fault(
            "last_turn_not_assistant",
            f"the last message is a {turns[-1].role} turn; end with the assistant's answer",
        )
    if all(turn.weight == 0 for turn in turns):
        yield Fault("nothing_to_learn", "every assistant turn has weight 0; give at least one weight 1")
