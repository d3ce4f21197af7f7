"""How long an example is for a model on this machine, without loading torch.

Knows a Hugging Face folder: its tokenizer, its chat template and its longest context. The template is rendered
as transformers does (same sandbox, same whitespace rules), which would take seconds only to import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from harli_appliance.config import Settings
from harli_appliance.errors import ConfigError
from harli_appliance.models.architectures import longest_context


@dataclass(frozen=True, slots=True)
class Lengths:
    """A `turns.ChatEncoder` of `model`; `context` is the most tokens that it can take."""

    model: Path
    context: int | None
    tokenizer: Tokenizer
    template: Template
    words: Mapping[str, str]
    """Special tokens that a template may name, e.g. ``bos_token``."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True
    ) -> list[int]:
        text = self.template.render(messages=messages, add_generation_prompt=generation_prompt, **self.words)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        end = self.tokenizer.token_to_id(self.words["eos_token"]) if "eos_token" in self.words else None
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def installed_lengths(settings: Settings, model: str | None) -> Lengths | None:
    """Lengths for `model`, or for the configured one if it is installed, or else None.

    Raises:
        ConfigError: `model` was named but is not on this machine, or its folder is incomplete.
    """
    name = model or settings.model.path
    for folder in (Path(name).expanduser(), settings.models / name):
        if (folder / "config.json").is_file():
            return _load(folder, settings.model.context_length)
    if model is None:
        return None
    raise ConfigError(
        f"model '{model}' is not on this machine; 'harli models' lists those that are", param="model"
    )


def _load(folder: Path, longest: int | None) -> Lengths:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        details = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        source = _template(folder, details)
        template = _environment().from_string(source)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ConfigError(f"{folder}: cannot count tokens with this model: {error}", param="model") from error
    return Lengths(folder, longest_context(config, longest), tokenizer, template, _words(details))


def _template(folder: Path, details: Mapping[str, Any]) -> str:
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    template = details.get("chat_template")
    if not isinstance(template, str):
        raise ValueError("it has no chat template")
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _words(details: Mapping[str, Any]) -> dict[str, str]:
    words = {}
    for name, value in details.items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                words[name] = content
    return words
