"""Rows of finished adapters, so that they are servable again after a start.

Functions here run inside `Database.run`; the weights lie elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlite_utils import Database


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk. `name` is what requests call it; `path` is its folder."""

    name: str
    job_id: str
    path: Path
    rank: int
    created_at: int


def insert_adapter(db: Database, name: str, job_id: str, path: Path, rank: int) -> Adapter:
    adapter = Adapter(name, job_id, path, rank, int(time.time()))
    db.table("adapters").insert({**asdict(adapter), "path": str(path)})
    return adapter


def list_adapters(db: Database) -> list[Adapter]:
    """All of them, the oldest first."""
    rows = db.table("adapters").rows_where(order_by="created_at, rowid")
    return [Adapter(**{**row, "path": Path(row["path"])}) for row in rows]
