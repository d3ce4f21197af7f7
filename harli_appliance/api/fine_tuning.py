"""``/v1/fine_tuning/jobs``: create, list, show, events, cancel, pause, resume.

Knows OpenAI's job objects. Does not know how a job runs or where it is kept.
"""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Annotated

from aiohttp import web
from pydantic import Field

from harli_appliance.api.bodies import Query, parse_json, read_body, read_query
from harli_appliance.api.fine_tuning_request import JobBody, PriorityBody
from harli_appliance.api.ports import FineTuning, Job, JobEvent
from harli_appliance.api.wire import (
    DpoHyperparameters,
    DpoMethod,
    Hyperparameters,
    JobError,
    JobEventObject,
    JobObject,
    JobProgress,
    ListOf,
    Method,
    SupervisedMethod,
)
from harli_appliance.errors import UsageError
from harli_appliance.schema import ENDED


class PageQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: str | None = None


class FineTuningRoutes:
    def __init__(self, port: FineTuning) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/fine_tuning/jobs", self.create),
            web.get("/v1/fine_tuning/jobs", self.list),
            web.get("/v1/fine_tuning/jobs/{id}", self.show),
            web.get("/v1/fine_tuning/jobs/{id}/events", self.events),
            web.post("/v1/fine_tuning/jobs/{id}/cancel", self.cancel),
            web.post("/v1/fine_tuning/jobs/{id}/pause", self.pause),
            web.post("/v1/fine_tuning/jobs/{id}/resume", self.resume),
            web.post("/harli/v1/jobs/{id}/priority", self.priority),
            web.get("/v1/fine_tuning/jobs/{id}/adapter", self.adapter),
        ]

    async def create(self, request: web.Request) -> web.Response:
        body = await read_body(request, JobBody)
        return _one(await self._port.create_job(body.spec()))

    async def list(self, request: web.Request) -> web.Response:
        query = read_query(request, PageQuery)
        jobs, more = await self._port.jobs(query.limit, query.after)
        data = [job_object(job) for job in jobs]
        page = ListOf[JobObject](
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=more,
        )
        return web.json_response(page.model_dump(mode="json"))

    async def show(self, request: web.Request) -> web.Response:
        return _one(await self._port.job(request.match_info["id"]))

    async def events(self, request: web.Request) -> web.Response:
        query = read_query(request, PageQuery)
        events, more = await self._port.events(request.match_info["id"], query.limit, query.after)
        data = [event_object(event) for event in events]
        page = ListOf[JobEventObject](
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=more,
        )
        return web.json_response(page.model_dump(mode="json"))

    async def cancel(self, request: web.Request) -> web.Response:
        return _one(await self._port.cancel_job(await _job_alone(request)))

    async def pause(self, request: web.Request) -> web.Response:
        return _one(await self._port.pause_job(await _job_alone(request)))

    async def resume(self, request: web.Request) -> web.Response:
        return _one(await self._port.resume_job(await _job_alone(request)))

    async def priority(self, request: web.Request) -> web.Response:
        body = await read_body(request, PriorityBody)
        return _one(await self._port.set_priority(request.match_info["id"], body.priority))

    async def adapter(self, request: web.Request) -> web.Response:
        folder = await self._port.adapter_folder(request.match_info["id"])
        return web.Response(
            body=await asyncio.to_thread(_archive, folder),
            content_type="application/x-tar",
            headers={"Content-Disposition": f'attachment; filename="{folder.name}.tar"'},
        )


async def _job_alone(request: web.Request) -> str:
    """The job's id of a request that says nothing else."""
    raw = await request.read()
    if raw and parse_json(raw):
        raise UsageError(f"{request.path} takes no body; leave it out", code="unknown_parameter")
    return request.match_info["id"]


def _archive(folder: Path) -> IO[bytes]:
    """The files of a folder as a tar, in a file without a name that goes when it is closed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the response closes it
    with tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    file.seek(0)
    return file


def _one(job: Job) -> web.Response:
    return web.json_response(job_object(job).model_dump(mode="json"))


def job_object(job: Job) -> JobObject:
    kind = DpoHyperparameters if job.method == "dpo" else Hyperparameters
    names = kind.model_fields.keys() - {"learning_rate_multiplier"}
    hyperparameters = kind(**{name: getattr(job, name) for name in names})
    error = None
    if job.error_code is not None:
        error = JobError(code=job.error_code, message=job.error_message or job.error_code)
    return JobObject(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file,
        trained_tokens=job.trained_tokens if job.status in ENDED else None,
        error=error,
        hyperparameters=hyperparameters,
        method=_method(hyperparameters),
        seed=job.seed,
        metadata=dict(job.metadata),
        harli=JobProgress(
            step=job.step,
            total_steps=job.total_steps,
            trained_tokens=job.trained_tokens,
            loss=job.loss,
            valid_loss=job.valid_loss,
            best_step=job.best_step,
            started_at=job.started_at,
            priority=job.priority,
            download_only=job.download_only,
        ),
    )


def _method(hyperparameters: Hyperparameters) -> Method:
    if isinstance(hyperparameters, DpoHyperparameters):
        return Method(type="dpo", dpo=DpoMethod(hyperparameters=hyperparameters))
    return Method(type="supervised", supervised=SupervisedMethod(hyperparameters=hyperparameters))


def event_object(event: JobEvent) -> JobEventObject:
    return JobEventObject(
        id=event.id,
        created_at=event.created_at,
        level=event.level,
        message=event.message,
        type="metrics" if event.data else "message",
        data=dict(event.data),
    )
