"""Uploads in the job queue: taken over whole or refused whole, kept while a job needs them."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from harli_appliance.api.ports import JobSpec
from harli_appliance.errors import ApplianceUnavailable, Conflict, DatasetError, NotFound, UsageError
from harli_appliance.training.queue import JobQueue
from harli_appliance.training.uploads import UploadFolder
from tests.queue_rig import (  # noqa: F401  fixtures
    GOOD,
    database,
    kept,
    queue,
    settings,
    spec,
    upload,
)


async def test_an_upload_is_taken_over_and_listed(queue, settings, upload):
    path = upload()
    file = await queue.create_file(path, "../dir/my data.jsonl", "fine-tune")
    assert (file.filename, file.bytes, file.purpose) == ("my data.jsonl", len(GOOD), "fine-tune")
    assert not path.exists()
    assert (await queue.file_path(file.id)).read_bytes() == GOOD
    assert await queue.files() == [file] == [await queue.file(file.id)]
    assert kept(settings) == [f"{file.id}.jsonl"]


async def test_files_are_listed_newest_first(queue, upload):
    made = [(await queue.create_file(upload(), f"{n}.jsonl", "fine-tune")).id for n in range(3)]
    assert [file.id for file in await queue.files()] == made[::-1]


async def test_a_malformed_upload_leaves_nothing_behind(queue, settings, upload):
    with pytest.raises(DatasetError, match=r"line 2: .* \(and 1 more; ") as error:
        await queue.create_file(upload(GOOD + b"{}\nnope\n"), "a.jsonl", "fine-tune")
    assert [finding.line for finding in error.value.findings] == [2, 3]
    assert await queue.files() == []
    assert kept(settings) == []


async def test_only_the_purpose_fine_tune_is_taken(queue, settings, upload):
    with pytest.raises(UsageError) as error:
        await queue.create_file(upload(), "a.jsonl", "batch")
    assert error.value.param == "purpose"
    assert kept(settings) == []


async def test_an_upload_over_the_configured_size_is_refused(database, settings, upload):
    small = settings.model_copy(update={"server": settings.server.model_copy(update={"max_upload_mib": 1})})
    with pytest.raises(DatasetError, match="limit is 1 MiB"):
        await JobQueue(database, small, model="tiny").create_file(upload(GOOD * 20_000), "a", "fine-tune")


async def test_examples_longer_than_the_context_are_refused(database, settings, upload):
    queue = JobQueue(
        database,
        settings,
        model="tiny",
        count_tokens=lambda example: len(example.messages) * 5,
        context_length=9,
    )
    with pytest.raises(DatasetError, match="10 tokens"):
        await queue.create_file(upload(), "a.jsonl", "fine-tune")


async def test_a_row_that_cannot_be_written_takes_the_file_away_again(queue, database, settings, upload):
    trigger = "CREATE TRIGGER refuse BEFORE INSERT ON files BEGIN SELECT RAISE(ABORT, 'refused'); END"
    await database.run(lambda db: db.execute(trigger))
    with pytest.raises(sqlite3.IntegrityError, match="refused"):
        await queue.create_file(upload(), "a.jsonl", "fine-tune")
    assert kept(settings) == []


def test_an_upload_comes_over_from_another_file_system(tmp_path, upload, monkeypatch):
    def other_device(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, "other device")

    folder, path = UploadFolder(tmp_path / "files"), upload()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", other_device)
        folder.bring_in(path, "file-1")
    folder.reveal("file-1")
    assert folder.path("file-1").read_bytes() == GOOD
    assert not path.exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, upload, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ApplianceUnavailable, match="No space left"):
        UploadFolder(tmp_path / "files").bring_in(upload(), "file-1")
    assert list((tmp_path / "files").iterdir()) == []


async def test_a_file_is_deleted_only_when_no_job_needs_it(queue, settings, spec):
    job = await queue.create_job(spec)
    with pytest.raises(Conflict, match=f"{job.id}.*queued"):
        await queue.delete_file(spec.training_file)
    await queue.next_job()
    with pytest.raises(Conflict, match=f"{job.id}.*running"):
        await queue.delete_file(spec.training_file)
    assert (await queue.file_path(spec.training_file)).is_file()
    await queue.fail(job.id, "x", "y")
    await queue.delete_file(spec.training_file)
    assert await queue.files() == []
    assert kept(settings) == []
    assert (await queue.job(job.id)).training_file == spec.training_file


@pytest.mark.parametrize("name", ["file-none", "", "\ud800", "a" * 10_000, "x\0y"])
async def test_what_does_not_exist_is_not_found(queue, name):
    files = (queue.file, queue.file_path, queue.delete_file)
    for call in (*files, queue.job, queue.cancel_job, queue.pause_job, queue.resume_job, queue.events):
        with pytest.raises(NotFound):
            await call(name)
    with pytest.raises(NotFound) as error:
        await queue.create_job(JobSpec(model="tiny", training_file=name))
    assert error.value.param == "training_file"
    with pytest.raises(NotFound) as error:
        await queue.jobs(after=name)
    assert error.value.param == "after"
