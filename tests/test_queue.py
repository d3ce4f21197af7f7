"""The job queue: uploads, jobs from queued to their end, cancellation, restarts, kills."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harli_appliance.api.ports import JobSpec
from harli_appliance.config import Settings, load_settings
from harli_appliance.errors import ApplianceUnavailable, Conflict, DatasetError, NotFound, UsageError
from harli_appliance.store.database import Database
from harli_appliance.training.hyperparameters import MAX_SEED
from harli_appliance.training.queue import JobQueue
from harli_appliance.training.uploads import UploadFolder

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return load_settings(home=tmp_path / "home")


@pytest.fixture
async def database(settings: Settings):
    database = await Database.open(settings.database)
    yield database
    await database.close()


@pytest.fixture
async def queue(settings: Settings, database: Database):
    queue = JobQueue(database, settings, model="tiny")
    await queue.recover()
    yield queue
    await queue.close()


@pytest.fixture
def upload(tmp_path: Path):
    def upload(content: bytes = GOOD) -> Path:
        path = tmp_path / "upload"
        path.write_bytes(content)
        return path

    return upload


@pytest.fixture
async def spec(queue: JobQueue, upload) -> JobSpec:
    file = await queue.create_file(upload(), "a.jsonl", "fine-tune")
    return JobSpec(model="tiny", training_file=file.id)


async def messages(queue: JobQueue, job_id: str) -> list[str]:
    events, more = await queue.events(job_id, limit=1000)
    assert not more
    return [event.message for event in reversed(events)]


def kept(settings: Settings) -> list[str]:
    return sorted(path.name for path in settings.files.glob("*"))


# -- files -------------------------------------------------------------------------------------------------


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
        database, settings, model="tiny", count_tokens=lambda chat: len(chat) * 5, context_length=9
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
    for call in (queue.file, queue.file_path, queue.delete_file, queue.job, queue.cancel_job, queue.events):
        with pytest.raises(NotFound):
            await call(name)
    with pytest.raises(NotFound) as error:
        await queue.create_job(JobSpec(model="tiny", training_file=name))
    assert error.value.param == "training_file"
    with pytest.raises(NotFound) as error:
        await queue.jobs(after=name)
    assert error.value.param == "after"


# -- making a job ------------------------------------------------------------------------------------------


async def test_a_job_is_stored_with_every_default_resolved(queue, spec):
    job = await queue.create_job(spec)
    assert job == await queue.job(job.id)
    assert (job.status, job.n_epochs, job.batch_size, job.learning_rate) == ("queued", 3, 8, 1e-3)
    assert (job.lora_rank, job.lora_alpha) == (8, 16.0)
    assert (job.use_rslora, job.lora_dropout) == (False, 0.0)
    assert (job.lr_scheduler_type, job.warmup_ratio, job.max_grad_norm) == ("cosine", 0.1, 1.0)
    assert 0 <= job.seed <= MAX_SEED
    assert job.fine_tuned_model is None
    assert await messages(queue, job.id) == [f"Created fine-tuning job: {job.id}"]
    assert (await queue.create_job(spec)).seed != job.seed


async def test_a_job_keeps_what_was_asked_for(queue, spec):
    asked = replace(
        spec,
        suffix="My-1",
        seed=0,
        n_epochs=1,
        batch_size=2,
        learning_rate=0.5,
        lora_rank=4,
        lora_alpha=1.5,
        use_rslora=True,
        lora_dropout=0.25,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        max_grad_norm=0.0,
        metadata={"team": "blau\ud800"},
    )
    job = await queue.create_job(asked)
    assert (job.suffix, job.seed, job.n_epochs, job.batch_size) == ("My-1", 0, 1, 2)
    assert (job.learning_rate, job.lora_rank, job.lora_alpha) == (0.5, 4, 1.5)
    assert job.use_rslora is True
    assert job.lora_dropout == 0.25
    assert (job.lr_scheduler_type, job.warmup_ratio, job.max_grad_norm) == ("linear", 0.0, 0.0)
    assert await queue.job(job.id) == job
    assert (await queue.job(job.id)).metadata == {"team": "blau\ud800"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "ft:tiny:harli:1"),
        ("suffix", ""),
        ("suffix", "a" * 41),
        ("suffix", "a:b"),
        ("suffix", "a\n"),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("n_epochs", 0),
        ("n_epochs", 101),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("lora_rank", 0),
        ("lora_rank", 17),
        ("lora_alpha", 0.0),
        ("lora_alpha", float("nan")),
        ("lora_dropout", -0.1),
        ("lora_dropout", 0.95),
        ("lora_dropout", float("nan")),
        ("lr_scheduler_type", "polynomial"),
        ("warmup_ratio", 1.01),
        ("warmup_ratio", float("nan")),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", float("inf")),
        ("metadata", {"k" * 65: "v"}),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {str(n): "v" for n in range(17)}),
    ],
)
async def test_a_value_out_of_range_is_refused_by_its_name(queue, spec, field, value):
    with pytest.raises(UsageError) as error:
        await queue.create_job(replace(spec, **{field: value}))
    assert error.value.param == field
    assert await queue.jobs() == ([], False)


async def test_a_rank_limit_below_the_default_rank_lowers_the_default(database, settings, spec):
    training = settings.training.model_copy(update={"max_lora_rank": 4})
    queue = JobQueue(database, settings.model_copy(update={"training": training}), model="tiny")
    assert (await queue.create_job(spec)).lora_rank == 4


async def test_no_job_is_taken_when_finetuning_is_off(database, settings, spec):
    training = settings.training.model_copy(update={"enabled": False})
    queue = JobQueue(database, settings.model_copy(update={"training": training}), model="tiny")
    with pytest.raises(Conflict, match="switched off"):
        await queue.create_job(spec)


# -- running a job -----------------------------------------------------------------------------------------


async def test_jobs_run_in_the_order_they_came_and_are_listed_newest_first(queue, spec):
    made = [(await queue.create_job(spec)).id for _ in range(3)]
    taken = [await queue.next_job() for _ in range(3)]
    assert [job.id for job in taken] == made
    assert {job.status for job in taken} == {"running"}
    assert await queue.next_job() is None
    page, more = await queue.jobs(limit=2)
    assert ([job.id for job in page], more) == ([made[2], made[1]], True)
    page, more = await queue.jobs(limit=2, after=page[-1].id)
    assert ([job.id for job in page], more) == ([made[0]], False)


async def test_a_job_that_succeeds_tells_its_story_and_leaves_an_adapter(queue, settings, spec):
    job = await queue.create_job(replace(spec, suffix="pirate"))
    await queue.next_job()
    await queue.progress(job.id, 1, 2, 64, 2.5)
    assert (await queue.job(job.id)).loss == 2.5
    await queue.progress(job.id, 2, 2, 128, 1.23456)
    done = await queue.succeed(job.id, settings.adapters / job.id, 8)
    name = f"ft:tiny:pirate:{job.id[-8:]}"
    assert (done.status, done.fine_tuned_model, done.step, done.total_steps) == ("succeeded", name, 2, 2)
    assert (done.trained_tokens, done.loss) == (128, 1.23456)
    assert done.finished_at >= done.started_at >= done.created_at
    assert await messages(queue, job.id) == [
        f"Created fine-tuning job: {job.id}",
        "Job started",
        "Step 1/2: training loss=2.5",
        "Step 2/2: training loss=1.235",
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]
    [adapter] = await queue.adapters()
    assert (adapter.name, adapter.job_id, adapter.rank) == (name, job.id, 8)
    assert adapter.path == settings.adapters / job.id


async def test_adapters_move_with_the_data_directory_unless_they_lie_elsewhere(
    queue, database, settings, spec
):
    for folder in (settings.adapters / "a", Path("/elsewhere/b")):
        job = await queue.create_job(spec)
        await queue.next_job()
        await queue.succeed(job.id, folder, 8)
    moved = JobQueue(database, settings.model_copy(update={"home": Path("/moved")}), model="tiny")
    assert [a.path for a in await moved.adapters()] == [Path("/moved/adapters/a"), Path("/elsewhere/b")]


async def test_a_job_that_fails_says_why_on_one_line(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    failed = await queue.fail(job.id, "out_of_memory", "no\nroom \ud800")
    assert (failed.status, failed.error_code, failed.error_message) == (
        "failed",
        "out_of_memory",
        "no room ?",
    )
    events, _ = await queue.events(job.id, limit=1)
    assert (events[0].level, events[0].message) == ("error", "Job failed: no room ?")
    assert await queue.adapters() == []


async def test_only_a_running_job_makes_progress_or_ends(queue, settings, spec):
    job = await queue.create_job(spec)
    for call in (
        lambda: queue.progress(job.id, 1, 2, 3, 1.0),
        lambda: queue.succeed(job.id, settings.adapters / "a", 8),
        lambda: queue.fail(job.id, "x", "y"),
    ):
        with pytest.raises(Conflict):
            await call()
    assert await messages(queue, job.id) == [f"Created fine-tuning job: {job.id}"]
    assert await queue.adapters() == []


async def test_a_long_job_keeps_every_step_but_tells_of_a_hundred(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    for step in range(1, 1001):
        await queue.progress(job.id, step, 1000, step, 1.0)
    told = [message for message in await messages(queue, job.id) if message.startswith("Step")]
    assert len(told) == 101
    assert told[0].startswith("Step 1/1000")
    assert told[-1].startswith("Step 1000/1000")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
async def test_a_loss_that_is_no_number_is_warned_of(queue, spec, loss):
    job = await queue.create_job(spec)
    await queue.next_job()
    await queue.progress(job.id, 1, 2, 3, loss)
    events, _ = await queue.events(job.id, limit=1)
    assert (events[0].level, events[0].message) == ("warn", "Step 1/2: no finite loss")
    assert (await queue.job(job.id)).loss is None


async def test_the_trainer_is_woken_by_a_new_job_and_not_before(queue, spec):
    waiting = asyncio.create_task(queue.wait_for_job())
    for _ in range(3):
        await queue.jobs()
    assert not waiting.done()
    job = await queue.create_job(spec)
    await waiting
    assert (await queue.next_job()).id == job.id
    waiting = asyncio.create_task(queue.wait_for_job())
    for _ in range(3):
        await queue.jobs()
    assert not waiting.done()
    waiting.cancel()


# -- cancelling --------------------------------------------------------------------------------------------


async def test_a_queued_job_is_cancelled_at_once(queue, spec):
    job = await queue.create_job(spec)
    assert (await queue.cancel_job(job.id)).status == "cancelled"
    assert await queue.next_job() is None
    assert not queue.cancel_requested(job.id)
    with pytest.raises(Conflict, match="is cancelled"):
        await queue.cancel_job(job.id)


async def test_a_running_job_is_cancelled_by_the_trainer(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    assert not queue.cancel_requested(job.id)
    for _ in range(2):
        assert (await queue.cancel_job(job.id)).status == "running"
        assert queue.cancel_requested(job.id)
    assert (await queue.finish_cancelled(job.id)).status == "cancelled"
    assert not queue.cancel_requested(job.id)
    assert (await messages(queue, job.id))[1:] == ["Job started", "Cancellation requested", "Job cancelled"]


async def test_a_job_that_ends_before_its_cancellation_has_ended(queue, settings, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    await queue.cancel_job(job.id)
    assert (await queue.succeed(job.id, settings.adapters / "a", 8)).status == "succeeded"
    assert not queue.cancel_requested(job.id)


async def test_a_client_that_hangs_up_still_gets_its_job_queued_and_the_trainer_woken(queue, spec):
    waiting = asyncio.create_task(queue.wait_for_job())
    await queue.jobs()
    request = asyncio.create_task(queue.create_job(spec))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.wait_for(waiting, 5)
    assert len((await queue.jobs())[0]) == 1


# -- starting again ----------------------------------------------------------------------------------------


async def test_a_restart_queues_what_ran_first_and_ends_what_was_being_cancelled(
    queue, database, settings, spec
):
    first, second, third = [await queue.create_job(spec) for _ in range(3)]
    await queue.next_job()
    await queue.progress(first.id, 10, 60, 640, 1.0)
    await queue.next_job()
    await queue.cancel_job(second.id)

    again = JobQueue(database, settings, model="tiny")
    await again.recover()
    await again.wait_for_job()
    assert [(await again.job(job.id)).status for job in (first, second, third)] == [
        "queued",
        "cancelled",
        "queued",
    ]
    resumed = await again.next_job()
    assert (resumed.id, resumed.step) == (first.id, 10)
    assert (await messages(again, first.id))[-2:] == [
        "The appliance was started again; the job resumes from its last checkpoint",
        "Job resumed",
    ]
    await again.progress(first.id, 5, 60, 320, 1.0)
    assert (await again.job(first.id)).step == 5
    assert (await again.next_job()).id == third.id


async def test_a_restart_sweeps_what_has_no_row_and_nothing_else(queue, database, settings, spec):
    (settings.files / "file-orphan.jsonl").write_bytes(GOOD)
    (settings.files / ".file-half.incoming").write_bytes(GOOD)
    await JobQueue(database, settings, model="tiny").recover()
    assert kept(settings) == [f"{spec.training_file}.jsonl"]


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
