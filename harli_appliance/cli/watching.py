"""Following a job over HTTP: its events as they come, its progress until the end.

Knows polling. An appliance that restarts in between keeps its jobs, so a short silence is waited out.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harli_appliance.api.wire import JobEventObject, JobObject
from harli_appliance.client import HarliClient
from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.schema import ENDED

POLL_S = 0.5
SILENCE_S = 60.0
"""How long an appliance that answered before may be gone."""


class Silence:
    """Whether an appliance that answered before has been gone for too long; one that never did has."""

    def __init__(self) -> None:
        self._since = -math.inf

    def heard(self) -> None:
        self._since = time.monotonic()

    def too_long(self) -> bool:
        return time.monotonic() - self._since > SILENCE_S


async def new_events(client: HarliClient, job_id: str, seen: str | None) -> list[JobEventObject]:
    """Events after the one called `seen`, oldest first."""
    found: list[JobEventObject] = []
    after = None
    while True:
        page = await client.events(job_id, limit=100, after=after)
        for event in page.data:
            if event.id == seen:
                return found[::-1]
            found.append(event)
        if not page.has_more or not page.data:
            return found[::-1]
        after = page.data[-1].id


async def each_event(
    client: HarliClient, job_id: str, show: Callable[[JobEventObject], None], *, follow: bool
) -> None:
    seen: str | None = None
    silence = Silence()
    while True:
        try:
            # The state first: what happens between the two calls is then shown before it ends.
            ended = (await client.job(job_id)).status in ENDED
            for event in await new_events(client, job_id, seen):
                show(event)
                seen = event.id
            silence.heard()
            if ended or not follow:
                return
        except ApplianceUnavailable:
            if silence.too_long():
                raise
        await asyncio.sleep(POLL_S)


async def until_ended(client: HarliClient, job_id: str) -> JobObject:
    """The job as it ended; a progress bar on stderr meanwhile."""
    job = await client.job(job_id)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(job.id, total=None, loss="")
        silence = Silence()
        silence.heard()
        while True:
            progress.update(
                task,
                description=f"{job.id} {job.status}",
                completed=job.harli.step,
                total=job.harli.total_steps or None,
                loss="" if job.harli.loss is None else f"loss {job.harli.loss:.3f}",
            )
            if job.status in ENDED:
                return job
            await asyncio.sleep(POLL_S)
            try:
                job = await client.job(job_id)
                silence.heard()
            except ApplianceUnavailable:
                if silence.too_long():
                    raise
