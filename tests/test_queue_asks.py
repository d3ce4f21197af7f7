"""What people ask of jobs: to cancel, to pause, to resume."""

from __future__ import annotations

import asyncio

import pytest

from harli_appliance.errors import Conflict
from tests.queue_rig import (  # noqa: F401  fixtures
    database,
    messages,
    queue,
    settings,
    spec,
    upload,
)


async def test_a_queued_job_is_cancelled_at_once(queue, spec):
    job = await queue.create_job(spec)
    assert (await queue.cancel_job(job.id)).status == "cancelled"
    assert await queue.next_job() is None
    assert queue.asked(job.id) is None
    with pytest.raises(Conflict, match="is cancelled"):
        await queue.cancel_job(job.id)


async def test_a_running_job_is_cancelled_by_the_trainer(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    assert queue.asked(job.id) is None
    for _ in range(2):
        assert (await queue.cancel_job(job.id)).status == "running"
        assert queue.asked(job.id) == "cancel"
    assert (await queue.stopped(job.id)).status == "cancelled"
    assert queue.asked(job.id) is None
    assert (await messages(queue, job.id))[1:] == ["Job started", "Cancellation requested", "Job cancelled"]


async def test_a_job_that_ends_before_its_cancellation_has_ended(queue, settings, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    await queue.cancel_job(job.id)
    assert (await queue.succeed(job.id, settings.adapters / "a", 8)).status == "succeeded"
    assert queue.asked(job.id) is None


async def test_a_queued_job_is_paused_at_once_and_keeps_its_place(queue, spec):
    first, second = [await queue.create_job(spec) for _ in range(2)]
    for _ in range(2):
        assert (await queue.pause_job(first.id)).status == "paused"
    assert (await queue.next_job()).id == second.id
    assert await queue.next_job() is None
    assert (await queue.resume_job(first.id)).status == "queued"
    assert (await queue.next_job()).id == first.id
    assert (await messages(queue, first.id))[1:] == ["Job paused", "Job queued again", "Job started"]


async def test_a_running_job_is_paused_by_the_trainer_and_resumes(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    await queue.progress(job.id, 3, 9, 64, 2.5)
    for _ in range(2):
        assert (await queue.pause_job(job.id)).status == "running"
        assert queue.asked(job.id) == "pause"
    paused = await queue.stopped(job.id)
    assert (paused.status, paused.step, paused.finished_at) == ("paused", 3, None)
    assert queue.asked(job.id) is None
    await queue.resume_job(job.id)
    assert (await queue.next_job()).step == 3
    assert (await messages(queue, job.id))[1:] == [
        "Job started",
        "Step 3/9: training loss=2.5",
        "Pause requested",
        "Job paused",
        "Job queued again",
        "Job resumed",
    ]


async def test_resuming_wakes_the_trainer(queue, spec):
    job = await queue.create_job(spec)
    await queue.pause_job(job.id)
    waiting = asyncio.create_task(queue.wait_for_job())
    for _ in range(3):
        await queue.jobs()
    assert not waiting.done()
    await queue.resume_job(job.id)
    await asyncio.wait_for(waiting, 5)


async def test_a_pause_is_withdrawn_or_overtaken_by_a_cancellation(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    await queue.pause_job(job.id)
    assert (await queue.resume_job(job.id)).status == "running"
    assert queue.asked(job.id) is None
    await queue.pause_job(job.id)
    await queue.cancel_job(job.id)
    assert queue.asked(job.id) == "cancel"
    with pytest.raises(Conflict, match="is being cancelled"):
        await queue.pause_job(job.id)
    with pytest.raises(Conflict, match="only a paused job"):
        await queue.resume_job(job.id)
    assert (await queue.stopped(job.id)).status == "cancelled"


async def test_a_pause_that_is_withdrawn_when_nothing_runs_any_more_queues_the_job(queue, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    await queue.pause_job(job.id)
    await queue.resume_job(job.id)
    assert (await queue.stopped(job.id)).status == "queued"
    assert (await queue.next_job()).id == job.id


async def test_a_paused_job_can_be_cancelled_and_needs_its_file_until_then(queue, spec):
    job = await queue.create_job(spec)
    await queue.pause_job(job.id)
    with pytest.raises(Conflict, match="is paused"):
        await queue.delete_file(spec.training_file)
    assert (await queue.cancel_job(job.id)).status == "cancelled"
    await queue.delete_file(spec.training_file)


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
async def test_an_ended_job_is_neither_paused_nor_resumed(queue, settings, spec, end):
    job = await queue.create_job(spec)
    await queue.next_job()
    if end == "succeed":
        await queue.succeed(job.id, settings.adapters / "a", 8)
    elif end == "fail":
        await queue.fail(job.id, "x", "y")
    else:
        await queue.cancel_job(job.id)
        await queue.stopped(job.id)
    for call in (queue.pause_job, queue.resume_job):
        with pytest.raises(Conflict, match=r"is (succeeded|failed|cancelled); only"):
            await call(job.id)


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
