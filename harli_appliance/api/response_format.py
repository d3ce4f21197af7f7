"""``response_format``: what form an answer must have. Knows OpenAI's field; does not know what can be enforced."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from harli_appliance.api.bodies import Body, contradiction

ANY_OBJECT = '{"type": "object"}'


class JsonSchema(Body):
    """A schema with the name that OpenAI wants for it. It is always enforced, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise contradiction(
                "'response_format' has a 'json_schema' exactly when its type is 'json_schema'", "json_schema"
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """JSON text of the schema to enforce, its properties in the order given; None for free text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.definition, ensure_ascii=False)
        return ANY_OBJECT if self.type == "json_object" else None
