"""The reference of every setting, generated from `config`: ``harli.toml`` and ``docs/configuration.md``.

``python -m harli_appliance.config_reference`` writes both into the working directory; a test fails when they
differ from what the settings say. Knows the shape of the settings, none of their meaning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harli_appliance.config import CONFIG_FILE, Section, Settings

REFERENCE_FILE = Path("docs/configuration.md")

TOML_HEAD = """\
# Settings of the Harli appliance, each with its default. Take the '#' before a setting away to change it.
#
# A flag wins over the environment (HARLI_SERVER__PORT=8000), that over this file, that over the default.
# `harli serve` reads harli.toml of the working directory, or what --config names.
"""

MARKDOWN_HEAD = """\
# Configuration

A flag wins over the environment, that over `harli.toml`, that over the default. `harli serve` reads
`harli.toml` of the working directory, or the file that `--config` names. A key that is not listed here is
refused, with the nearest valid name. In `harli.toml` a setting stands in its section (`[server]`, then
`port = 8321`); in the environment it is called `HARLI_SERVER__PORT`, and lists are written as JSON.

Three more variables are for the commands that ask an appliance: `HARLI_URL`, where it is; `HARLI_API_KEY`, the key
that they send, which is not the one that the server wants (`HARLI_SERVER__API_KEY`); and `HARLI_THEME`, of the
dashboard. Where nothing says otherwise `home` lies in `XDG_DATA_HOME`.

This page is generated from the settings by `python -m harli_appliance.config_reference`.
"""

_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `section` is empty at the top of the file; `default` is TOML, None where there is none."""

    section: str
    name: str
    default: str | None
    example: str
    values: str
    sentence: str

    @property
    def variable(self) -> str:
        return "HARLI_" + "__".join((*filter(None, self.section.split(".")), self.name)).upper()


def settings_reference() -> list[Setting]:
    """Every setting, in the order of the tree."""
    return list(_settings_of(Settings, ""))


def _settings_of(model: type[BaseModel], section: str) -> Iterator[Setting]:
    """A section's own settings come before the sections in it, as TOML wants it."""
    inner = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner.append((name, field.annotation))
        else:
            yield _setting(section, name, field)
    for name, kind in inner:
        yield from _settings_of(kind, f"{section}.{name}".removeprefix("."))


def toml_text() -> str:
    """``harli.toml``: every setting commented out, under its sentence."""
    lines = [TOML_HEAD]
    for section, settings in _by_section():
        if section:
            lines.append(f"[{section}]")
        for setting in settings:
            values = f" ({setting.values.replace('`', '')})" if setting.values else ""
            unset = " Not set by default." if setting.default is None else ""
            lines += [f"# {setting.sentence}{values}{unset}", f"# {setting.name} = {setting.example}", ""]
    return "\n".join(lines)


def markdown_text() -> str:
    """``docs/configuration.md``: a table for each section."""
    lines = [MARKDOWN_HEAD]
    for section, settings in _by_section():
        lines += [f"## {section or 'At the top'}", ""]
        lines += ["| setting | default | values | what it does | environment |", "|---|---|---|---|---|"]
        for setting in settings:
            default = f"`{setting.default}`" if setting.default is not None else "not set"
            row = (f"`{setting.name}`", default, setting.values, setting.sentence, f"`{setting.variable}`")
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write both files into a checkout."""
    (folder / CONFIG_FILE).write_text(toml_text(), encoding="utf-8")
    (folder / REFERENCE_FILE).write_text(markdown_text(), encoding="utf-8")


def _by_section() -> Iterator[tuple[str, list[Setting]]]:
    settings = settings_reference()
    for section in dict.fromkeys(setting.section for setting in settings):
        yield section, [setting for setting in settings if setting.section == section]


def _setting(section: str, name: str, field: FieldInfo) -> Setting:
    if not field.description:
        raise TypeError(f"setting '{name}' has no sentence; give it a description in config.py")
    path = f"{section}.{name}".removeprefix(".")
    default: str | None
    if field.default_factory is not None:
        default = example = _EXAMPLES[path]
    elif field.default is None:
        default, example = None, _EXAMPLES[path]
    else:
        default = example = json.dumps(field.default)
    return Setting(section, name, default, example, _values(field), field.description)


_EXAMPLES = {
    "home": '"~/.local/share/harli"',
    "server.api_key": '"a long secret"',
    "model.served_name": '"my-model"',
    "model.context_length": "2048",
    "model.chunked_prefill_tokens": "512",
    "model.max_running_requests": "64",
    "slo.tpot_ms": "200.0",
    "slo.ttft_ms": "5000.0",
    "slo.interactive.tpot_ms": "100.0",
    "slo.interactive.ttft_ms": "2000.0",
    "slo.batch.tpot_ms": "500.0",
    "slo.batch.ttft_ms": "30000.0",
    "training.window_tokens": "256",
    "training.sequence_tokens": "1024",
    "device.inference_cores": "[0, 1]",
    "device.training_cores": "[2, 3]",
    "device.attention": '"triton"',
    "memory.pool_slots": "65536",
}
"""What a setting may look like whose default is none, or depends on the machine."""


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return _choices(get_args(field.annotation))
    if isinstance(field.json_schema_extra, dict) and isinstance(
        choices := field.json_schema_extra.get("enum"), list
    ):
        return _choices(choices)
    return ", ".join(
        f"{_SIGNS[type(bound)]} {astuple(bound)[0]:g}" for bound in field.metadata if type(bound) in _SIGNS
    )


def _choices(choices: Iterable[object]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices)


if __name__ == "__main__":
    write(Path.cwd())
    sys.stderr.write(f"wrote {CONFIG_FILE} and {REFERENCE_FILE}\n")
