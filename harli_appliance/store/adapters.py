"""Rows of finished adapters, so that they are servable again after a start.

Functions here run inside `Database.run`; the weights lie elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk. `name` is what requests call it; `path` is its folder.

    `download_only` is one of a method that cannot be served.
    """

    name: str
    job_id: str
    path: Path
    rank: int
    created_at: int
    download_only: bool = False


def insert_adapter(
    db: Database, name: str, job_id: str, path: Path, rank: int, *, download_only: bool = False
) -> Adapter:
    adapter = Adapter(name, job_id, path, rank, int(time.time()), download_only)
    db.table("adapters").insert({**asdict(adapter), "path": str(path)})
    return adapter


def list_adapters(db: Database, model: str) -> list[Adapter]:
    """Those of one base model, the oldest first."""
    rows = db.table("adapters").rows_where(
        "job_id IN (SELECT id FROM jobs WHERE model = ?)", [model], order_by="rowid"
    )
    return [_adapter(row) for row in rows]


def adapter_of(db: Database, job_id: str) -> Adapter | None:
    """What a job has made, None before it has succeeded."""
    row = next(db.table("adapters").rows_where("job_id = ?", [job_id]), None)
    return None if row is None else _adapter(row)


def delete_adapter(db: Database, name: str) -> Adapter | None:
    """The adapter that had this name, None when there was none."""
    row = next(db.table("adapters").rows_where("name = ?", [name]), None)
    if row is None:
        return None
    db.table("adapters").delete_where("name = ?", [name])
    return _adapter(row)


def _adapter(row: dict[str, Any]) -> Adapter:
    return Adapter(**{**row, "path": Path(row["path"]), "download_only": bool(row["download_only"])})
