"""Preferences in OpenAI's format: a prompt, an answer that is preferred, and one that is not.

``{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}``; outputs are lists of
assistant messages. Knows the rules of one line, and which rules lines of the other formats have; knows nothing
of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from harli_appliance.training.examples import (
    Example,
    Fault,
    PreferenceExample,
    Verdict,
    judge_chat,
    judge_text,
    unused_keys,
)
from harli_appliance.training.strict_json import shown

OUTPUTS = ("preferred_output", "non_preferred_output")


def judge(value: object) -> Verdict:
    """Check one parsed line of whatever format its keys say."""
    if isinstance(value, list):
        fault = Fault("json_array", "this is a JSON array; write one object a line, without the brackets")
        return Verdict(None, (fault,), ())
    if not isinstance(value, dict):
        fault = Fault("not_an_object", f"the line is {shown(value)}; write an object with 'messages'")
        return Verdict(None, (fault,), ())
    if "messages" not in value and not {"input", *OUTPUTS}.isdisjoint(value):
        return judge_preference(value)
    if "messages" not in value and "text" in value:
        return judge_text(value)
    return judge_chat(value)


def judge_preference(value: Mapping[str, Any]) -> Verdict:
    """Check a line with ``input`` and two outputs."""
    warnings = tuple(unused_keys(value, {"input", *OUTPUTS}))
    faults = tuple(_shape_faults(value))
    if faults:
        return Verdict(None, faults, warnings)
    prompt = value["input"]["messages"]
    sides = []
    for name in OUTPUTS:
        verdict = judge_chat({"messages": [*_unweighted(prompt), *value[name]]})
        if not isinstance(verdict.example, Example):
            told = tuple(
                replace(fault, message=f"with '{name}': {fault.message}") for fault in verdict.faults
            )
            return Verdict(None, told, warnings)
        sides.append(_only_answer(verdict.example, len(prompt)))
    if sides[0] == sides[1]:
        fault = Fault("same_outputs", "both outputs are the same, so there is nothing to prefer; change one")
        return Verdict(None, (fault,), warnings)
    return Verdict(PreferenceExample(*sides), (), warnings)


def _shape_faults(value: Mapping[str, Any]) -> Iterator[Fault]:
    prompt = value.get("input")
    if not isinstance(prompt, dict) or not isinstance(prompt.get("messages"), list) or not prompt["messages"]:
        yield Fault("input_wrong", "'input' is no object with 'messages'; write the prompt's messages there")
    elif prompt.get("tools"):
        yield Fault("unsupported", "'input' has tools, which cannot be trained; leave them out")
    for name in OUTPUTS:
        output = value.get(name)
        if not isinstance(output, list) or not output:
            yield Fault(
                "output_wrong", f"'{name}' is no list of messages; write the assistant's answer there"
            )
        elif any(not isinstance(turn, dict) or turn.get("role") != "assistant" for turn in output):
            yield Fault(
                "output_wrong", f"'{name}' holds what is no assistant message; write only the answer there"
            )


def _unweighted(messages: list[Any]) -> list[Any]:
    """The prompt's turns are never learned, whatever weight they have."""
    return [
        {key: item for key, item in turn.items() if key != "weight"} if isinstance(turn, dict) else turn
        for turn in messages
    ]


def _only_answer(whole: Example, prompt: int) -> Example:
    turns = enumerate(whole.messages)
    return Example(tuple(turn if at >= prompt else replace(turn, weight=0) for at, turn in turns))
