"""JSON schemas as grammars: which can be enforced, and with what white space. Knows llguidance, not SGLang.

SGLang compiles the same schema with the same rules when it serves the request; checking here first, away from
the inference lane, lets an answer be refused before it is queued.
"""

from __future__ import annotations

from llguidance import LLMatcher

from harli_appliance.errors import UsageError

BACKEND = "llguidance"
WHITESPACE = r"[ \n\t]{0,24}"
"""Between JSON tokens: room for indented output, and an end to it, which small models do not find themselves."""
LONGEST_SCHEMA = 200_000


def check_json_schema(schema: str) -> None:
    """Refuse a schema that cannot be enforced to the letter.

    Args:
        schema: JSON text of the schema.

    Raises:
        UsageError: it is not a schema, contradicts itself, is too large, or uses keywords that are not known.
    """
    if len(schema) > LONGEST_SCHEMA:
        raise _refusal(f"it has {len(schema)} characters, more than {LONGEST_SCHEMA}")
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
        )
        fault = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        fault = str(error)
    if fault:
        raise _refusal(" ".join(fault.split()))


def _refusal(why: str) -> UsageError:
    return UsageError(f"'response_format' cannot be enforced: {why}", param="response_format")
