"""A job's priority: its share of device time beside other jobs; jobs of before have the usual one."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0009_job_priority(db: Database) -> None:
    db.execute(
        "ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 10 CHECK (priority BETWEEN 1 AND 100)"
    )
