"""Rows of uploaded files. Functions here run inside `Database.run`; the bytes lie elsewhere."""

from __future__ import annotations

import time
from typing import Any

from sqlite_utils import Database

from harli_appliance.api.ports import StoredFile
from harli_appliance.errors import Conflict, NotFound
from harli_appliance.schema import DataFormat
from harli_appliance.store.ids import bindable


def insert_file(
    db: Database,
    file_id: str,
    filename: str,
    purpose: str,
    size: int,
    examples: int,
    format: DataFormat = "chat",
) -> StoredFile:
    db.table("files").insert(
        {
            "id": file_id,
            "filename": filename,
            "purpose": purpose,
            "bytes": size,
            "examples": examples,
            "created_at": int(time.time()),
            "format": format,
        }
    )
    return get_file(db, file_id)


def get_file(db: Database, file_id: str, param: str | None = None) -> StoredFile:
    """One file.

    Raises:
        NotFound: there is none; names `param` as the field at fault.
    """
    row = next(db.table("files").rows_where("id = ?", [bindable(file_id)]), None)
    if row is None:
        raise NotFound(f"no file '{file_id}'; upload it first", code="file_not_found", param=param)
    return _file(row)


def list_files(db: Database) -> list[StoredFile]:
    return [_file(row) for row in db.table("files").rows_where(order_by="seq DESC")]


def delete_file(db: Database, file_id: str) -> None:
    """Forget a file.

    Raises:
        NotFound: there is none.
        Conflict: a job that has not ended needs it.
    """
    get_file(db, file_id)
    used = "(training_file = :id OR validation_file = :id) AND finished_at IS NULL"
    job = next(db.table("jobs").rows_where(used, {"id": file_id}), None)
    if job is not None:
        raise Conflict(
            f"file '{file_id}' is used by job '{job['id']}', which is {job['status']}; cancel the job first",
            code="file_in_use",
        )
    db.table("files").delete_where("id = ?", [file_id])


def _file(row: dict[str, Any]) -> StoredFile:
    return StoredFile(
        id=row["id"],
        filename=row["filename"],
        purpose=row["purpose"],
        bytes=row["bytes"],
        created_at=row["created_at"],
        format=row["format"],
    )
