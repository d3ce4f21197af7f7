"""Themes of the dashboard: TOML files in ``themes/``, one a theme, with the colours and the lanes' colours.

Knows the files and Textual's theme. A lane's colour reaches stylesheets and widgets as ``$harli-<lane>``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from textual.theme import Theme

from harli_appliance.assets import themes_folder
from harli_appliance.errors import ConfigError

Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]

DEFAULT = "dark"
PREFIX = "harli-"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Colours(Part):
    background: Colour
    surface: Colour
    panel: Colour
    foreground: Colour
    primary: Colour
    secondary: Colour
    accent: Colour
    success: Colour
    warning: Colour
    error: Colour


class Lanes(Part):
    serving: Colour
    training: Colour
    cached: Colour
    free: Colour
    target: Colour


class ThemeFile(Part):
    dark: bool
    colors: Colours
    lanes: Lanes

    def theme(self, name: str) -> Theme:
        return Theme(
            name=PREFIX + name,
            dark=self.dark,
            variables={PREFIX + lane: colour for lane, colour in self.lanes},
            **dict(self.colors),
        )


def load_themes(folder: Path | None = None) -> dict[str, ThemeFile]:
    """Every theme by name, the default one first.

    Raises:
        ConfigError: a file is no theme; names the file and the entry.
    """
    folder = folder or themes_folder()
    themes = {path.stem: _load(path) for path in sorted(folder.glob("*.toml"))}
    if DEFAULT not in themes:
        raise ConfigError(f"{folder}: the theme {DEFAULT}.toml is missing; put it back")
    return {DEFAULT: themes.pop(DEFAULT), **themes}


def _load(path: Path) -> ThemeFile:
    try:
        return ThemeFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: '{entry}': {first['msg']}; themes/dark.toml shows a whole theme"
        ) from error
