"""The job queue after a restart and after being killed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from harli_appliance.config import Settings
from harli_appliance.store import files as file_rows
from harli_appliance.store.database import Database
from harli_appliance.training.queue import JobQueue
from tests.queue_rig import (  # noqa: F401  fixtures
    GOOD,
    database,
    kept,
    messages,
    queue,
    settings,
    spec,
    upload,
)


async def test_a_restart_queues_what_ran_and_does_what_was_asked_of_it(queue, database, settings, spec):
    first, second, third, fourth = [await queue.create_job(spec) for _ in range(4)]
    fifth = await queue.create_job(spec)
    await queue.pause_job(fifth.id)
    await queue.next_job()
    await queue.progress(first.id, 10, 60, 640, 1.0)
    await queue.next_job()
    await queue.cancel_job(second.id)
    await queue.next_job()
    await queue.pause_job(third.id)

    again = JobQueue(database, settings, model="tiny")
    await again.recover()
    await again.wait_for_job()
    assert [(await again.job(job.id)).status for job in (first, second, third, fourth, fifth)] == [
        "queued",
        "cancelled",
        "paused",
        "queued",
        "paused",
    ]
    resumed = await again.next_job()
    assert (resumed.id, resumed.step) == (first.id, 10)
    assert (await messages(again, first.id))[-2:] == [
        "The appliance was started again; the job resumes from its last checkpoint",
        "Job resumed",
    ]
    await again.progress(first.id, 5, 60, 320, 1.0)
    assert (await again.job(first.id)).step == 5
    assert (await again.next_job()).id == fourth.id


async def test_checkpoints_are_kept_for_what_may_go_on_and_for_what_failed(queue, settings, spec):
    _queued, paused, cancelled, failed, done = [(await queue.create_job(spec)).id for _ in range(5)]
    await queue.cancel_job(cancelled)
    await queue.set_priority(failed, 50)
    await queue.set_priority(done, 40)
    await queue.fail((await queue.next_job()).id, "x", "y")
    await queue.succeed((await queue.next_job()).id, settings.adapters / "a", 8)
    await queue.pause_job(paused)
    assert await queue.needing_no_checkpoints() == {cancelled, done}


async def test_a_restart_sweeps_unfinished_uploads_and_nothing_else(queue, database, settings, spec):
    """Files without a row may be all that is left of what a person had, if the database is a new one."""
    (settings.files / "file-unknown.jsonl").write_bytes(GOOD)
    (settings.files / ".file-half.incoming").write_bytes(GOOD)
    await JobQueue(database, settings, model="tiny").recover()
    assert kept(settings) == sorted([f"{spec.training_file}.jsonl", "file-unknown.jsonl"])


async def test_an_upload_that_was_killed_after_its_row_was_written_is_whole(queue, database, settings, spec):
    path = await queue.file_path(spec.training_file)
    path.rename(settings.files / f".{spec.training_file}.incoming")
    again = JobQueue(database, settings, model="tiny")
    await again.recover()
    assert (await again.file_path(spec.training_file)).read_bytes() == GOOD


@pytest.mark.parametrize("before", ["bring_in", "insert_file", "reveal"])
async def test_an_upload_that_ends_while_the_appliance_starts_is_kept(
    database, settings, upload, monkeypatch, before
):
    """The sweep knows the rows of a moment ago, at whatever point an upload is."""
    queue = JobQueue(database, settings, model="tiny")
    swept = queue._uploads.sweep
    begun, gone_on = threading.Event(), threading.Event()

    def held(step):
        def run(*args, **named):
            begun.set()
            assert gone_on.wait(10)
            return step(*args, **named)

        return run

    whose = file_rows if before == "insert_file" else queue._uploads
    monkeypatch.setattr(whose, before, held(getattr(whose, before)))
    uploading = asyncio.create_task(queue.create_file(upload(), "a.jsonl", "fine-tune"))
    await asyncio.to_thread(begun.wait, 10)
    assert swept([]) == []
    gone_on.set()
    file = await uploading
    assert swept([]) == []
    assert (await queue.file_path(file.id)).read_bytes() == GOOD


WRITER = """
import asyncio, json, sys
from pathlib import Path
from harli_appliance.api.ports import JobSpec
from harli_appliance.config import load_settings
from harli_appliance.store.database import Database
from harli_appliance.training.queue import JobQueue

def tell(*words):
    print(json.dumps(words), flush=True)

async def main(home):
    settings = load_settings(home=home)
    queue = JobQueue(await Database.open(settings.database), settings, model="tiny")
    await queue.recover()
    while True:
        upload = home / "upload"
        upload.write_bytes(sys.argv[2].encode())
        file = await queue.create_file(upload, "a.jsonl", "fine-tune")
        tell("file", file.id)
        job = await queue.create_job(JobSpec(model="tiny", training_file=file.id))
        tell("job", job.id, "queued", 0)
        running = await queue.next_job()
        for step in (1, 2, 3):
            await queue.progress(running.id, step, 3, step, 1.0)
            tell("job", running.id, "running", step)
        await queue.succeed(running.id, home / "adapters" / running.id, 8)
        tell("job", running.id, "succeeded", 3)

asyncio.run(main(Path(sys.argv[1])))
"""


def run_and_kill(settings: Settings, cwd: Path, after_lines: int) -> list[list]:
    """What a writer told until it was killed, which is in the middle of whatever it did then."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(settings.home), GOOD.decode()],
        stdout=subprocess.PIPE,
        cwd=cwd,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(after_lines)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
    return [json.loads(line) for line in lines if line.endswith("\n")]


async def test_nothing_told_is_lost_and_nothing_is_half_there_after_kills(settings, tmp_path):
    """Kill -9 in the middle of writes, several times on the same directory."""
    settings.home.mkdir()
    pick = random.Random(7)
    told: dict[str, tuple[str, int]] = {}
    stored: set[str] = set()
    order = ["queued", "running", "succeeded"]
    for _ in range(4):
        for kind, *words in run_and_kill(settings, tmp_path, pick.randint(15, 40)):
            if kind == "file":
                stored.add(words[0])
            else:
                told[words[0]] = (words[1], words[2])

    with sqlite3.connect(settings.database) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    raw.close()
    database = await Database.open(settings.database)
    queue = JobQueue(database, settings, model="tiny")
    await queue.recover()
    found = {job.id: job for job in (await queue.jobs(limit=100_000))[0]}
    assert len(told) > 10
    for job_id, (status, step) in told.items():
        job = found[job_id]
        # A later write may have been kept without being told of, and a restart sends running jobs back.
        reached = "running" if job.status == "queued" and job.started_at else job.status
        assert order.index(reached) >= order.index(status)
        assert job.step >= min(step, 1)  # a resumed job repeats its steps
        assert job.step == 3 or job.status != "succeeded"
    adapters = {adapter.job_id for adapter in await queue.adapters()}
    assert adapters == {job.id for job in found.values() if job.status == "succeeded"}
    for job in found.values():
        story = await messages(queue, job.id)
        assert story[0] == f"Created fine-tuning job: {job.id}"
        assert ("The job has successfully completed" in story) == (job.status == "succeeded")
    files = {file.id for file in await queue.files()}
    assert stored <= files
    assert kept(settings) == sorted(f"{file_id}.jsonl" for file_id in files)
    for file_id in files:
        assert (await queue.file_path(file_id)).read_bytes() == GOOD
    await database.close()


async def test_jobs_and_adapters_of_another_model_wait_for_it(queue, database, settings, spec):
    done, running, waiting, paused = [(await queue.create_job(spec)).id for _ in range(4)]
    await queue.next_job()
    await queue.succeed(done, settings.adapters / done, 8)
    await queue.next_job()
    await queue.pause_job(paused)
    for _ in range(2):
        other = JobQueue(database, settings, model="other")
        await other.recover()
    assert await other.next_job() is None
    assert await other.adapters() == []
    told = "Waits for its model: tiny; other is served now"
    for job_id, status in ((running, "queued"), (waiting, "queued"), (paused, "paused")):
        assert (await other.job(job_id)).status == status
        assert (await messages(other, job_id)).count(told) == 1
    assert told not in await messages(other, done)
    await other.resume_job(paused)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(other.wait_for_job(), 0.05)
    own = await other.create_job(replace(spec, model="other"))
    assert (await other.next_job()).id == own.id
    assert await other.next_job() is None

    again = JobQueue(database, settings, model="tiny")
    await again.recover()
    assert [(await again.next_job()).id for _ in range(3)] == [running, waiting, paused]
    assert [adapter.job_id for adapter in await again.adapters()] == [done]
