"""Rank-stabilised scaling and dropout of a job's adapter; jobs of before had neither."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0006_lora_options(db: Database) -> None:
    db.execute(
        "ALTER TABLE jobs ADD COLUMN use_rslora INTEGER NOT NULL DEFAULT 0 CHECK (use_rslora IN (0, 1))"
    )
    db.execute(
        "ALTER TABLE jobs ADD COLUMN lora_dropout REAL NOT NULL DEFAULT 0 "
        "CHECK (lora_dropout >= 0 AND lora_dropout < 1)"
    )
