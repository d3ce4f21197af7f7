"""One SQLite file behind one writer thread.

`Database.run` hands a function to that thread and awaits its result; the function runs as one transaction,
so calls are serial, whole, and on disk when they return. Knows SQLite; knows no table.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import sqlite_utils

from harli_appliance.errors import ApplianceUnavailable, ConfigError
from harli_appliance.store.migrating import migrate

BUSY_TIMEOUT_S = 5.0
"""How long to wait for another program (a backup, a shell) that holds the file."""

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

T = TypeVar("T")


class Database:
    """An open, migrated database. Build it with `open`, and `close` it."""

    def __init__(self, path: Path, executor: ThreadPoolExecutor, db: sqlite_utils.Database) -> None:
        self.path = path
        self._executor = executor
        self._db = db
        self._closed = False

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        migrations: str = "harli",
        migrations_folder: Path | None = None,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> Database:
        """Open or create the file and apply pending migrations.

        Args:
            path: the file; its folder is made when missing.
            migrations: name of the migration set that describes this database.
            migrations_folder: where to look for it, when not in the installation's own.
            synchronous: FULL survives a power cut after each call; NORMAL may lose the last ones.

        Raises:
            ConfigError: the file cannot be used or is from a newer version; with the code
                ``database_damaged`` it is no database, or its content is malformed.
        """
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sqlite-{path.stem}")

        def connect() -> sqlite_utils.Database:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
            except (OSError, sqlite3.Error) as error:
                raise ConfigError(f"database {path} cannot be opened: {error}; check its folder") from error
            db = sqlite_utils.Database(connection, execute_plugins=False)
            try:
                db.enable_wal()
                db.execute(f"PRAGMA synchronous = {synchronous}")
                # Enforced only afterwards: a migration may drop and rebuild a table that others refer to.
                migrate(db, migrations, migrations_folder)
                db.execute("PRAGMA foreign_keys = ON")
            except sqlite3.DatabaseError as error:
                db.close()
                message, code = _why(path, error)
                raise ConfigError(message, code=code) from error
            except BaseException:
                db.close()
                raise
            return db

        try:
            db = await asyncio.get_running_loop().run_in_executor(executor, connect)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(path, executor, db)

    async def run(self, work: Callable[[sqlite_utils.Database], T]) -> T:
        """Run `work` on the writer thread as one transaction: all of it is kept, or it raises and none is.

        A caller that is cancelled leaves the transaction either not begun or whole.

        Raises:
            ApplianceUnavailable: the database is closed, cannot be written (a full disk, another writer), or is
                damaged.
        """
        if self._closed:
            raise ApplianceUnavailable("the appliance is stopping; try again when it runs")

        def transaction() -> T:
            try:
                with self._db.atomic():
                    return work(self._db)
            except sqlite3.DatabaseError as error:
                if not (isinstance(error, sqlite3.OperationalError) or _is_damaged(error)):
                    raise  # a constraint: the fault lies in `work`
                message, code = _why(self.path, error)
                raise ApplianceUnavailable(message, code=code) from error

        return await asyncio.get_running_loop().run_in_executor(self._executor, transaction)

    async def close(self) -> None:
        """Wait for what was handed over, then close the file. May be called twice."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._executor, self._db.close)
        self._executor.shutdown()


def _is_damaged(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED  # the higher bits say more


def _why(path: Path, error: sqlite3.Error) -> tuple[str, str]:
    """What is wrong and what to do, and the error's code. Moving a file away is advised only where it is lost."""
    if _is_damaged(error):
        return (
            f"database {path} is damaged: {error}; restore a copy of it, or move it away to start afresh",
            "database_damaged",
        )
    return (
        f"database {path} cannot be used: {error}; check that its disk has room and can be written",
        "database_unavailable",
    )
