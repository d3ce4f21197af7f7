"""Rows of finetuning jobs and their events, and the only legal moves between a job's states.

    queued -> running -> succeeded | failed | cancelled
    queued | running -> paused -> queued
    queued | paused -> cancelled    running -> queued (the appliance was started again)

Functions here run inside `Database.run`, so a move and the event that tells of it are one transaction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from sqlite_utils import Database

from harli_appliance.api.ports import Job, JobEvent
from harli_appliance.errors import Conflict, NotFound
from harli_appliance.schema import ENDED, JobStatus
from harli_appliance.store.ids import bindable, new_id
from harli_appliance.store.pages import page

Level = Literal["info", "warn", "error"]
EventData = Mapping[str, float | int | str]
Ask = Literal["pause", "cancel"]
"""What a person asked of a running job, which the trainer does at its next unit boundary."""

MOVES: Mapping[JobStatus, frozenset[JobStatus]] = {
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

_COLUMNS = tuple(field.name for field in fields(Job))


def insert_job(db: Database, job: Job) -> Job:
    written = {"metadata": json.dumps(dict(job.metadata)), "target_modules": json.dumps(job.target_modules)}
    db.table("jobs").insert({**asdict(job), **written})
    return get_job(db, job.id)


def get_job(db: Database, job_id: str) -> Job:
    """One job.

    Raises:
        NotFound: there is none.
    """
    return _job(_row(db, job_id))


def list_jobs(db: Database, limit: int, after: str | None) -> tuple[list[Job], bool]:
    rows, more = page(db, "jobs", limit, after)
    return [_job(row) for row in rows], more


def needing_no_checkpoints(db: Database) -> set[str]:
    """Ids of the jobs that neither go on nor failed."""
    rows = db.table("jobs").rows_where("status IN ('succeeded', 'cancelled')", select="id")
    return {row["id"] for row in rows}


def overview(db: Database, limit: int) -> list[Job]:
    """What matters now: running jobs, queued ones in their order, paused ones, then what ended last."""
    order = (
        "CASE status WHEN 'running' THEN 0 WHEN 'queued' THEN 1 WHEN 'paused' THEN 2 ELSE 3 END, "
        "finished_at DESC, priority DESC, seq"
    )
    return [_job(row) for row in db.table("jobs").rows_where(order_by=order, limit=limit)]


def jobs_in(db: Database, status: JobStatus) -> list[Job]:
    """Jobs of one state, the longest waiting first."""
    return [_job(row) for row in db.table("jobs").rows_where("status = ?", [status], order_by="seq")]


def next_queued(db: Database, model: str) -> Job | None:
    """The one of the highest priority that finetunes `model`, among equals the oldest."""
    rows = db.table("jobs").rows_where(
        # Not by `created_at`: a clock may be set back.
        "status = 'queued' AND model = ?",
        [model],
        order_by="priority DESC, seq",
        limit=1,
    )
    return next((_job(row) for row in rows), None)


def move_job(db: Database, job_id: str, status: JobStatus, **changes: object) -> Job:
    """Take a job to another state, with its clock, and `changes` of other columns.

    Raises:
        NotFound: there is no such job.
        Conflict: the job cannot go there from where it is.
    """
    job = get_job(db, job_id)
    if status not in MOVES[job.status]:
        raise Conflict(f"job '{job_id}' is {job.status}; it cannot become {status}", code="job_state")
    now = int(time.time())
    if status == "running" and job.started_at is None:
        changes["started_at"] = now
    if not MOVES[status]:
        changes["finished_at"] = now
    changes["asked"] = None
    _update(db, job_id, status=status, **changes)
    return get_job(db, job_id)


def set_priority(db: Database, job_id: str, priority: int) -> Job:
    """Change the priority of a job that has not ended.

    Raises:
        Conflict: it has.
    """
    job = get_job(db, job_id)
    if job.status in ENDED:
        raise Conflict(f"job '{job_id}' is {job.status}; its priority no longer matters", code="job_state")
    _update(db, job_id, priority=priority)
    return get_job(db, job_id)


def update_running(db: Database, job_id: str, **changes: object) -> Job:
    """Change columns of a job that runs.

    Raises:
        Conflict: it does not run.
    """
    job = get_job(db, job_id)
    if job.status != "running":
        raise Conflict(f"job '{job_id}' is {job.status}, not running", code="job_state")
    _update(db, job_id, **changes)
    return get_job(db, job_id)


def asked_of(db: Database, job_id: str) -> Ask | None:
    asked: Ask | None = _row(db, job_id)["asked"]
    return asked


def add_event(
    db: Database, job_id: str, level: Level, message: str, data: EventData | None = None
) -> JobEvent:
    """Tell of something in a job's life.

    Raises:
        NotFound: there is no such job.
    """
    get_job(db, job_id)
    event = JobEvent(
        id=new_id("ftevent"),
        job_id=job_id,
        created_at=int(time.time()),
        level=level,
        message=message,
        data=dict(data or {}),
    )
    db.table("job_events").insert({**asdict(event), "data": json.dumps(event.data, allow_nan=False)})
    return event


def list_events(db: Database, job_id: str, limit: int, after: str | None) -> tuple[list[JobEvent], bool]:
    get_job(db, job_id)
    rows, more = page(db, "job_events", limit, after, "job_id = ?", [job_id])
    return [_event(row) for row in rows], more


def _row(db: Database, job_id: str) -> dict[str, Any]:
    row: dict[str, Any] | None = next(db.table("jobs").rows_where("id = ?", [bindable(job_id)]), None)
    if row is None:
        raise NotFound(f"no job '{job_id}'; list the jobs to see their ids", code="job_not_found")
    return row


def _update(db: Database, job_id: str, **changes: object) -> None:
    assignments = ", ".join(f"{column} = :{column}" for column in changes)
    # The columns are this module's own words; every value is bound.
    db.execute(f"UPDATE jobs SET {assignments} WHERE id = :job_id", {**changes, "job_id": job_id})  # noqa: S608


def _job(row: Mapping[str, Any]) -> Job:
    values: dict[str, Any] = {column: row[column] for column in _COLUMNS}
    values |= {"metadata": json.loads(row["metadata"]), "use_rslora": bool(row["use_rslora"])}
    values["target_modules"] = tuple(json.loads(row["target_modules"]))
    return Job(**values)


def _event(row: Mapping[str, Any]) -> JobEvent:
    return JobEvent(
        id=row["id"],
        job_id=row["job_id"],
        created_at=row["created_at"],
        level=row["level"],
        message=row["message"],
        data=json.loads(row["data"]),
    )
