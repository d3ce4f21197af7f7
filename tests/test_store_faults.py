"""The store on a full disk and with damaged files: one line that says what to do, and nothing is lost."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest
import sqlite_utils

from harli_appliance.errors import ApplianceUnavailable, ConfigError
from harli_appliance.store.database import Database
from harli_appliance.store.lock import HomeLock
from harli_appliance.store.usage import USAGE_FILE, RequestUsage, UsageLog


def usage(number: int) -> RequestUsage:
    return RequestUsage(f"r{number}", "tiny", 3, 4, 1.5, None, "stop", number)


async def write(database: Database, sql: str, *values: object) -> None:
    await database.run(lambda db: db.execute(sql, values))


def damage(path: Path) -> None:
    """Overwrite all pages but the first, which has the schema."""
    size = int.from_bytes(path.read_bytes()[16:18], "big")
    with path.open("r+b") as file:
        file.seek(size)
        file.write(b"\xa5" * (path.stat().st_size - size))


@pytest.mark.parametrize("why", ["disk I/O error", "database or disk is full", "database is locked"])
async def test_a_database_on_a_full_disk_is_not_to_be_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def fail(self: object) -> None:
        raise sqlite3.OperationalError(why)

    monkeypatch.setattr(sqlite_utils.Database, "enable_wal", fail)
    with pytest.raises(ConfigError, match=f"{why}; check that its disk has room and can be written$"):
        await Database.open(tmp_path / "harli.db")


async def test_a_disk_that_is_full_while_running_is_named(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "harli.db")
    await write(database, "CREATE TABLE rows (x)")
    await write(database, "PRAGMA max_page_count = 1")
    with pytest.raises(ApplianceUnavailable, match="full; check that its disk has room") as error:
        await write(database, "INSERT INTO rows VALUES (zeroblob(1000000))")
    assert error.value.code == "database_unavailable"
    await database.close()


async def test_a_damaged_page_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "harli.db"
    database = await Database.open(path)
    await write(database, "CREATE TABLE rows (x)")
    await write(database, "INSERT INTO rows SELECT zeroblob(10000) FROM json_each('[1, 2, 3]')")
    await database.close()
    root = (
        sqlite3.connect(path).execute("SELECT rootpage FROM sqlite_master WHERE name = 'rows'").fetchone()[0]
    )
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xa5" * 4096)
    database = await Database.open(path)
    with pytest.raises(ApplianceUnavailable, match=r"is damaged: .*malformed; restore a copy") as error:
        await database.run(lambda db: db.execute("SELECT * FROM rows").fetchall())
    assert error.value.code == "database_damaged"
    await database.close()


@pytest.mark.parametrize("how", ["a page", "all of it"])
async def test_a_damaged_usage_log_is_moved_aside_and_a_new_one_begun(tmp_path: Path, how: str) -> None:
    log = await UsageLog.open(tmp_path)
    for number in range(200):
        await log.add(usage(number))
    await log.close()
    path = tmp_path / USAGE_FILE
    if how == "a page":
        damage(path)
    else:
        path.write_bytes(b"not a database at all" * 100)
    before = path.read_bytes()
    log = await UsageLog.open(tmp_path)
    await log.add(usage(1000))
    assert [each.id for each in await log.recent()] == ["r1000"]
    await log.close()
    (aside,) = tmp_path.glob(f"{USAGE_FILE}-damaged-*[0-9]")
    assert aside.read_bytes() == before


def test_a_full_disk_keeps_nobody_from_locking_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "ftruncate", full)
    with HomeLock(tmp_path / "home"):
        pass
