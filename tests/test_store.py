"""The store: migrations, transactions on one thread, legal states, the lock of a data directory."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from harli_appliance.api.ports import Job
from harli_appliance.assets import migrations_folder
from harli_appliance.errors import ApplianceUnavailable, ConfigError, Conflict, NotFound, UsageError
from harli_appliance.store import adapters, files, jobs, predictor
from harli_appliance.store.database import Database
from harli_appliance.store.lock import LOCK_FILE, HomeLock
from harli_appliance.store.migrating import load_migrations
from harli_appliance.store.usage import RequestUsage, UsageLog

QUEUED = Job(
    id="ftjob-1",
    status="queued",
    model="tiny",
    training_file="file-1",
    created_at=1,
    seed=0,
    n_epochs=1,
    batch_size=1,
    learning_rate=1e-3,
    lora_rank=8,
    lora_alpha=16.0,
)


@pytest.fixture
async def database(tmp_path: Path):
    database = await Database.open(tmp_path / "harli.db")
    await database.run(lambda db: files.insert_file(db, "file-1", "a.jsonl", "fine-tune", 10, 1))
    yield database
    await database.close()


async def write(database: Database, sql: str, *values: object) -> None:
    await database.run(lambda db: db.execute(sql, values))


async def scalar(database: Database, sql: str) -> object:
    return await database.run(lambda db: db.execute(sql).fetchone()[0])


# -- the database ------------------------------------------------------------------------------------------


async def test_opens_with_the_promised_durability(database: Database):
    assert await scalar(database, "PRAGMA journal_mode") == "wal"
    assert await scalar(database, "PRAGMA synchronous") == 2  # FULL
    assert await scalar(database, "PRAGMA foreign_keys") == 1
    assert await scalar(database, "PRAGMA busy_timeout") == 5000


async def test_a_failing_call_leaves_nothing_behind(database: Database):
    def work(db):
        jobs.insert_job(db, QUEUED)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        await database.run(work)
    assert await scalar(database, "SELECT count(*) FROM jobs") == 0


async def test_all_calls_run_on_one_thread_that_is_not_the_loops(database: Database):
    threads = await asyncio.gather(*(database.run(lambda _: threading.get_ident()) for _ in range(20)))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_another_connection_reads_what_a_call_wrote(database: Database):
    await database.run(lambda db: jobs.insert_job(db, QUEUED))
    with sqlite3.connect(database.path) as other:
        assert other.execute("SELECT id FROM jobs").fetchall() == [("ftjob-1",)]
    other.close()


async def test_a_closed_database_says_so(tmp_path: Path):
    database = await Database.open(tmp_path / "harli.db")
    await database.close()
    await database.close()
    with pytest.raises(ApplianceUnavailable, match="stopping"):
        await database.run(lambda db: None)


async def test_a_file_that_is_no_database_is_refused_and_untouched(tmp_path: Path):
    path = tmp_path / "harli.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match="not a database"):
        await Database.open(path)
    assert path.read_bytes() == b"not a database at all" * 100


async def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be opened"):
        await Database.open(tmp_path / "file" / "harli.db")


# -- migrations --------------------------------------------------------------------------------------------

FIRST = """
from sqlite_utils import Migrations
migrations = Migrations("harli")

@migrations()
def m1(db):
    db.execute("CREATE TABLE a (x)")
"""

SECOND = """
from sqlite_utils import Migrations
migrations = Migrations("harli")

@migrations()
def m2(db):
    db.execute("INSERT INTO a VALUES (1)")
    db.execute("CREATE TABLE b (x)")
    {end}
"""


async def test_migrations_are_applied_once_and_in_order(tmp_path: Path):
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_a.py").write_text(FIRST)
    path = tmp_path / "harli.db"
    await (await Database.open(path, migrations_folder=folder)).close()
    (folder / "0002_b.py").write_text(SECOND.format(end=""))
    for _ in range(2):
        await (await Database.open(path, migrations_folder=folder)).close()
    database = await Database.open(path, migrations_folder=folder)
    assert await scalar(database, "SELECT count(*) FROM a") == 1
    await database.close()


async def test_a_failing_migration_is_rolled_back_whole(tmp_path: Path):
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_a.py").write_text(FIRST)
    (folder / "0002_b.py").write_text(SECOND.format(end="raise RuntimeError('broken')"))
    path = tmp_path / "harli.db"
    with pytest.raises(RuntimeError, match="broken"):
        await Database.open(path, migrations_folder=folder)
    (folder / "0002_b.py").write_text(SECOND.format(end=""))
    database = await Database.open(path, migrations_folder=folder)
    assert await scalar(database, "SELECT count(*) FROM a") == 1
    await database.close()


async def test_a_database_from_a_newer_version_is_refused(tmp_path: Path):
    path = tmp_path / "harli.db"
    database = await Database.open(path)
    await write(
        database,
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('harli', 'm9999_new', '')",
    )
    await database.close()
    with pytest.raises(ConfigError, match=r"newer version .*m9999_new.*upgrade"):
        await Database.open(path)


async def test_a_database_of_before_pausing_keeps_its_jobs_events_and_adapters(tmp_path: Path):
    """The migration rebuilds a table that others refer to with ON DELETE CASCADE."""
    old = tmp_path / "migrations"
    old.mkdir()
    for path in migrations_folder().glob("000[123]*.py"):
        shutil.copy(path, old)
    path = tmp_path / "harli.db"
    database = await Database.open(path, migrations_folder=old)
    for sql in (
        "INSERT INTO files (id, filename, purpose, bytes, examples, created_at)"
        " VALUES ('file-1', 'a', 'fine-tune', 1, 1, 1)",
        "INSERT INTO jobs (id, status, model, training_file, created_at, seed, n_epochs, batch_size,"
        " learning_rate, lora_rank, lora_alpha, lora_dropout)"
        " SELECT 'ftjob-' || value, 'queued', 'tiny', 'file-1', value, 7, 1, 1, 0.1, 8, 16, 0.25"
        " FROM json_each('[1, 2, 3]')",
        "UPDATE jobs SET status = 'running', started_at = 5 WHERE id != 'ftjob-1'",
        "UPDATE jobs SET cancel_requested = 1, step = 3, total_steps = 9 WHERE id = 'ftjob-2'",
        "UPDATE jobs SET status = 'succeeded', finished_at = 6, fine_tuned_model = 'ft' WHERE id = 'ftjob-3'",
        "INSERT INTO job_events (id, job_id, created_at, level, message)"
        " VALUES ('e1', 'ftjob-1', 1, 'info', 'hello')",
        "INSERT INTO adapters (name, job_id, path, rank, created_at) VALUES ('ft', 'ftjob-3', 'a', 8, 6)",
    ):
        await write(database, sql)
    await database.close()

    database = await Database.open(path)
    found = {job.id: job for job in (await database.run(lambda db: jobs.list_jobs(db, 10, None)))[0]}
    assert {name: job.status for name, job in found.items()} == {
        "ftjob-3": "succeeded", "ftjob-2": "running", "ftjob-1": "queued",
    }  # fmt: skip
    assert (found["ftjob-2"].step, found["ftjob-2"].started_at, found["ftjob-2"].lora_dropout) == (3, 5, 0.25)
    assert await database.run(lambda db: jobs.asked_of(db, "ftjob-2")) == "cancel"
    events, _ = await database.run(lambda db: jobs.list_events(db, "ftjob-1", 10, None))
    assert [event.message for event in events] == ["hello"]
    assert [a.name for a in await database.run(lambda db: adapters.list_adapters(db, "tiny"))] == ["ft"]
    assert await database.run(lambda db: db.execute("PRAGMA foreign_key_check").fetchall()) == []
    await database.run(lambda db: jobs.insert_job(db, replace(QUEUED, id="ftjob-4")))
    assert await scalar(database, "SELECT seq FROM jobs WHERE id = 'ftjob-4'") == 4
    with pytest.raises(sqlite3.IntegrityError):
        await write(database, "DELETE FROM jobs WHERE id = 'ftjob-3'")
    await database.close()


def test_each_migration_has_its_own_name_and_its_own_set():
    for name in ("harli", "harli-metrics"):
        names = [step.name for migrations in load_migrations(name) for step in migrations._migrations]
        assert names
        assert names == sorted(set(names))


# -- legal states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        ("succeeded", {"fine_tuned_model": "ft:tiny"}),
        ("failed", {"error_code": "x", "error_message": "y"}),
        ("cancelled", {}),
        ("paused", {}),
        ("queued", {}),
    ],
)
async def test_a_running_job_can_go_to_every_end_to_a_pause_and_back_to_the_queue(database, status, changes):
    def work(db):
        jobs.insert_job(db, QUEUED)
        jobs.move_job(db, "ftjob-1", "running")
        return jobs.move_job(db, "ftjob-1", status, **changes)

    job = await database.run(work)
    assert job.status == status
    assert (job.finished_at is None) == (status in ("queued", "paused"))
    assert job.started_at is not None


@pytest.mark.parametrize("status", ["succeeded", "failed", "queued"])
async def test_a_queued_job_cannot_skip_running(database: Database, status):
    await database.run(lambda db: jobs.insert_job(db, QUEUED))
    with pytest.raises(Conflict, match=f"is queued; it cannot become {status}"):
        await database.run(lambda db: jobs.move_job(db, "ftjob-1", status))


async def test_a_paused_job_goes_on_through_the_queue_or_is_cancelled(database: Database):
    def work(db):
        jobs.insert_job(db, QUEUED)
        jobs.move_job(db, "ftjob-1", "paused")
        for status in ("running", "succeeded", "failed"):
            with pytest.raises(Conflict, match="is paused"):
                jobs.move_job(db, "ftjob-1", status)
        jobs.move_job(db, "ftjob-1", "queued")
        jobs.move_job(db, "ftjob-1", "paused")
        return jobs.move_job(db, "ftjob-1", "cancelled")

    assert (await database.run(work)).finished_at is not None


async def test_sql_itself_lets_no_paused_job_run(database: Database):
    await database.run(lambda db: jobs.insert_job(db, QUEUED))
    await database.run(lambda db: jobs.move_job(db, "ftjob-1", "paused"))
    for sql in ("UPDATE jobs SET status = 'running', started_at = 1", "DELETE FROM files"):
        with pytest.raises(sqlite3.IntegrityError):
            await write(database, sql)


async def test_an_ended_job_stays_ended(database: Database):
    await database.run(lambda db: jobs.insert_job(db, QUEUED))
    await database.run(lambda db: jobs.move_job(db, "ftjob-1", "cancelled"))
    for status in jobs.MOVES:
        with pytest.raises(Conflict):
            await database.run(lambda db, status=status: jobs.move_job(db, "ftjob-1", status))


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE jobs SET status = 'succeeded', finished_at = 1, fine_tuned_model = 'x'",
        "UPDATE jobs SET status = 'resting'",
        "UPDATE jobs SET asked = 'pause'",
        "UPDATE jobs SET status = 'running'",
        "UPDATE jobs SET status = 'cancelled'",
        "UPDATE jobs SET finished_at = 1",
        "UPDATE jobs SET fine_tuned_model = 'x'",
        "UPDATE jobs SET error_code = 'x'",
        "UPDATE jobs SET step = 5",
        "UPDATE jobs SET step = -1",
        "UPDATE jobs SET lora_dropout = 1",
        "UPDATE jobs SET use_rslora = 2",
        "UPDATE jobs SET lr_scheduler_type = 'step'",
        "UPDATE jobs SET warmup_ratio = 1.1",
        "UPDATE jobs SET max_grad_norm = -1",
        "UPDATE jobs SET metadata = 'not json'",
        "DELETE FROM files",
        "INSERT INTO job_events (id, job_id, created_at, level, message) VALUES ('e', 'none', 1, 'info', '')",
        "INSERT INTO job_events (id, job_id, created_at, level, message) VALUES ('e', 'ftjob-1', 1, '?', '')",
    ],
)
async def test_sql_itself_refuses_illegal_states(database: Database, sql):
    await database.run(lambda db: jobs.insert_job(db, QUEUED))
    with pytest.raises(sqlite3.IntegrityError):
        await write(database, sql)


async def test_a_job_must_begin_queued_and_with_a_file(database: Database):
    for wrong in ({"status": "running", "started_at": 1}, {"training_file": "file-none"}):
        row = {
            "id": "ftjob-2",
            "model": "tiny",
            "training_file": "file-1",
            "status": "queued",
            "created_at": 1,
        }
        row |= {"seed": 0, "n_epochs": 1, "batch_size": 1, "learning_rate": 1e-3, "lora_rank": 8}
        row |= {"lora_alpha": 16, **wrong}
        with pytest.raises(sqlite3.IntegrityError):
            await database.run(lambda db, row=row: db.table("jobs").insert(row))


# -- pages -------------------------------------------------------------------------------------------------


async def test_pages_go_on_after_the_last_item_seen(database: Database):
    def work(db):
        jobs.insert_job(db, QUEUED)
        for number in range(5):
            jobs.add_event(db, "ftjob-1", "info", str(number), {"step": number})

    await database.run(work)
    seen: list[str] = []
    after, more = None, True
    while more:
        events, more = await database.run(lambda db, after=after: jobs.list_events(db, "ftjob-1", 2, after))
        seen += [event.message for event in events]
        after = events[-1].id
    assert seen == ["4", "3", "2", "1", "0"]
    assert events[0].data == {"step": 0}


async def test_a_page_refuses_a_cursor_of_another_list_and_an_empty_limit(database: Database):
    await database.run(lambda db: jobs.insert_job(db, QUEUED))
    with pytest.raises(NotFound) as error:
        await database.run(lambda db: jobs.list_jobs(db, 2, "ftjob-none"))
    assert error.value.param == "after"
    with pytest.raises(UsageError) as error:
        await database.run(lambda db: jobs.list_jobs(db, 0, None))
    assert error.value.param == "limit"


# -- the rest ----------------------------------------------------------------------------------------------


async def test_adapters_and_the_predictor_come_back_as_written(database: Database):
    def work(db):
        jobs.insert_job(db, QUEUED)
        adapters.insert_adapter(db, "ft:tiny:harli:1", "ftjob-1", Path("/somewhere/a"), 8)
        for data in ({"c": [1.0, 2.0]}, {"c": [3.5]}):
            predictor.save_predictor(db, "cpu", "tiny", "1", data)
        return (
            adapters.list_adapters(db, "tiny"),
            predictor.load_predictor(db, "cpu", "tiny", "1"),
            predictor.load_predictor(db, "cpu", "tiny", "2"),
        )

    found, fit, other = await database.run(work)
    assert [(adapter.name, adapter.path, adapter.rank) for adapter in found] == [
        ("ft:tiny:harli:1", Path("/somewhere/a"), 8)
    ]
    assert fit == {"c": [3.5]}
    assert other is None


async def test_usage_is_kept_apart_and_forgets_its_oldest_rows(tmp_path: Path):
    log = await UsageLog.open(tmp_path)
    for number in range(5):
        await log.add(RequestUsage(f"r{number}", "tiny", 3, 4, 1.5, None, "stop", number))
    assert [usage.id for usage in await log.recent(2)] == ["r4", "r3"]
    await log.close()
    log = await UsageLog.open(tmp_path, kept_rows=3)
    assert [usage.id for usage in await log.recent()] == ["r4", "r3", "r2"]
    await log.close()
    assert [path.name for path in tmp_path.glob("*.db")] == ["harli-metrics.db"]


# -- the lock ----------------------------------------------------------------------------------------------

HOLD = """
import sys, pathlib
from harli_appliance.store.lock import HomeLock
HomeLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_appliance_is_refused_with_the_pid_until_the_first_is_killed(tmp_path: Path):
    home = tmp_path / "home"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Conflict, match=rf"in use by another appliance \(pid {holder.pid}\)"):
            HomeLock(home).acquire()
        holder.kill()
        holder.wait()
        with HomeLock(home):
            assert (home / LOCK_FILE).read_text() == f"{os.getpid()}\n"
            with pytest.raises(Conflict):
                HomeLock(home).acquire()
        HomeLock(home).acquire()


def test_the_data_directory_is_private(tmp_path: Path):
    with HomeLock(tmp_path / "home"):
        assert (tmp_path / "home").stat().st_mode & 0o077 == 0


def test_a_data_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="HARLI_HOME"):
        HomeLock(tmp_path / "file" / "home").acquire()
