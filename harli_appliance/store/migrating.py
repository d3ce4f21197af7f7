"""Brings a database up to date with the modules in ``migrations/``.

Every module there defines ``migrations``, a `sqlite_utils.Migrations`; modules are read in the order of
their names. Each migration is one transaction: it is applied with its record, or not at all.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from sqlite_utils import Database, Migrations

from harli_appliance.assets import migrations_folder
from harli_appliance.errors import ConfigError


def load_migrations(set_name: str, folder: Path | None = None) -> list[Migrations]:
    """The migrations of one set (one database), in order."""
    loaded = [
        runpy.run_path(str(path))["migrations"]
        for path in sorted((folder or migrations_folder()).glob("*.py"))
    ]
    return [migrations for migrations in loaded if migrations.name == set_name]


def migrate(db: Database, set_name: str, folder: Path | None = None) -> None:
    """Apply what is pending.

    Raises:
        ConfigError: the database holds a migration that this version does not know.
    """
    steps = load_migrations(set_name, folder)
    if not steps:
        raise ConfigError(f"no migrations called '{set_name}'; install harli-appliance again")
    known = {step.name for migrations in steps for step in migrations.pending(Database(memory=True))}
    unknown = [step.name for step in steps[0].applied(db) if step.name not in known]
    if unknown:
        raise ConfigError(
            f"the database is from a newer version of the appliance (it has '{unknown[0]}'); "
            "upgrade harli-appliance, or set HARLI_HOME to another folder",
            code="database_too_new",
        )
    for migrations in steps:
        migrations.apply(db)
