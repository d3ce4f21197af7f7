"""Where the folders lie that ship beside the code: ``migrations/`` and ``themes/``.

An installed wheel carries them inside the package; a checkout (also one installed with ``pip install -e``)
has them beside it. Knows nothing of what is in them.
"""

from __future__ import annotations

from pathlib import Path

from harli_appliance.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def asset_folder(name: str) -> Path:
    """The folder called `name`.

    Raises:
        ConfigError: neither layout has it, so the installation is broken.
    """
    for folder in (_PACKAGE / "_assets" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"the folder '{name}' is missing from this installation ({_PACKAGE}); install harli-appliance again"
    )


def migrations_folder() -> Path:
    return asset_folder("migrations")


def themes_folder() -> Path:
    return asset_folder("themes")
