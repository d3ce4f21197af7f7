"""The job queue: jobs from their making to their end."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harli_appliance.errors import ApplianceUnavailable, Conflict, NotFound, UsageError
from harli_appliance.schema import TARGET_MODULES
from harli_appliance.training.hyperparameters import MAX_SEED
from harli_appliance.training.queue import JobQueue
from harli_appliance.training.validation import Standing
from tests.queue_rig import (  # noqa: F401  fixtures
    database,
    messages,
    queue,
    settings,
    spec,
    upload,
)


async def test_a_job_is_stored_with_every_default_resolved(queue, spec):
    job = await queue.create_job(spec)
    assert job == await queue.job(job.id)
    assert (job.status, job.n_epochs, job.batch_size, job.learning_rate) == ("queued", 3, 8, 1e-3)
    assert (job.lora_rank, job.lora_alpha) == (8, 16.0)
    assert (job.use_rslora, job.lora_dropout) == (False, 0.0)
    assert (job.lr_scheduler_type, job.warmup_ratio, job.max_grad_norm) == ("cosine", 0.1, 1.0)
    assert (job.peft_method, job.target_modules, job.download_only) == ("lora", TARGET_MODULES, False)
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
        peft_method="dora",
        target_modules=("v_proj", "q_proj"),
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
    assert (job.peft_method, job.target_modules, job.download_only) == ("dora", ("v_proj", "q_proj"), True)
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
        ("eval_steps", 5),
        ("early_stopping_patience", 3),
        ("method", "reinforcement"),
        ("beta", 0.1),
        ("peft_method", "bitfit"),
        ("target_modules", ()),
        ("target_modules", ("q_proj", "q_proj")),
        ("target_modules", ("q_proj", "lm_head")),
        ("lr_scheduler_type", "polynomial"),
        ("warmup_ratio", 1.01),
        ("warmup_ratio", float("nan")),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", float("inf")),
        ("priority", 0),
        ("priority", 101),
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


async def test_a_validation_file_is_kept_and_must_exist(queue, spec, upload):
    with pytest.raises(NotFound) as error:
        await queue.create_job(replace(spec, validation_file="file-none"))
    assert error.value.param == "validation_file"
    held_out = (await queue.create_file(upload(), "b.jsonl", "fine-tune")).id
    job = await queue.create_job(
        replace(spec, validation_file=held_out, eval_steps=5, early_stopping_patience=3)
    )
    assert (job.validation_file, job.eval_steps, job.early_stopping_patience) == (held_out, 5, 3)
    with pytest.raises(Conflict, match="is used by job"):
        await queue.delete_file(held_out)
    await queue.next_job()
    await queue.evaluated(job.id, Standing(5, 1.5, 5, 1.5, 0))
    await queue.evaluated(job.id, Standing(20, float("nan"), 5, 1.5, 3))
    await queue.evaluated(job.id, Standing(20, 1.75, 5, 1.5, 3))
    told = await messages(queue, job.id)
    assert told[-4:] == [
        "Step 5/0: validation loss=1.5, the best",
        "Step 20/0: no finite validation loss",
        "Step 20/0: validation loss=1.75, the best was step 5",
        "No better in 3 evaluations: the job ends with step 5",
    ]
    found = await queue.job(job.id)
    assert (found.valid_loss, found.best_step) == (1.75, 5)


async def test_a_job_and_its_file_must_be_of_one_kind(queue, spec, tmp_path):
    prompt = {"messages": [{"role": "user", "content": "a"}]}
    sides = [[{"role": "assistant", "content": content}] for content in "bc"]
    pair = {"input": prompt, "preferred_output": sides[0], "non_preferred_output": sides[1]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair))
    pairs = (await queue.create_file(path, "pairs.jsonl", "fine-tune")).id
    for wrong in (replace(spec, training_file=pairs), replace(spec, method="dpo")):
        with pytest.raises(UsageError, match="choose another file or method") as error:
            await queue.create_job(wrong)
        assert error.value.param == "training_file"
    assert await queue.jobs() == ([], False)
    job = await queue.create_job(replace(spec, method="dpo", beta=0.3, training_file=pairs))
    assert (await queue.job(job.id)).beta == 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_rank", 4), ("lora_alpha", 8.0), ("use_rslora", True), ("lora_dropout", 0.1)],
)
async def test_what_has_no_meaning_for_ia3_is_refused_by_its_name(queue, spec, field, value):
    with pytest.raises(UsageError) as error:
        await queue.create_job(replace(spec, peft_method="ia3", **{field: value}))
    assert error.value.param == field
    assert (await queue.create_job(replace(spec, peft_method="ia3"))).download_only


async def test_an_adapter_that_cannot_be_served_is_told_of_and_can_be_fetched(queue, spec, settings):
    job = await queue.create_job(replace(spec, peft_method="dora"))
    with pytest.raises(Conflict, match="is queued and has no adapter"):
        await queue.adapter_folder(job.id)
    await queue.next_job()
    folder = settings.adapters / job.id
    folder.mkdir(parents=True)
    await queue.succeed(job.id, folder, job.lora_rank)
    assert [adapter.download_only for adapter in await queue.adapters()] == [True]
    assert f"A dora adapter cannot be served; fetch it: harli jobs download {job.id}" in await messages(
        queue, job.id
    )
    assert await queue.adapter_folder(job.id) == folder
    folder.rmdir()
    with pytest.raises(NotFound, match="is gone"):
        await queue.adapter_folder(job.id)


async def test_a_rank_limit_below_the_default_rank_lowers_the_default(database, settings, spec):
    training = settings.training.model_copy(update={"max_lora_rank": 4})
    queue = JobQueue(database, settings.model_copy(update={"training": training}), model="tiny")
    assert (await queue.create_job(spec)).lora_rank == 4


async def test_no_job_is_taken_when_finetuning_is_off(database, settings, spec):
    training = settings.training.model_copy(update={"enabled": False})
    queue = JobQueue(database, settings.model_copy(update={"training": training}), model="tiny")
    with pytest.raises(Conflict, match="switched off"):
        await queue.create_job(spec)


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


async def test_a_clock_that_is_set_back_lets_no_job_overtake(queue, spec, monkeypatch):
    made = []
    for now in (2000, 1000):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda now=now: now)
            made.append((await queue.create_job(spec)).id)
    assert [job.id for job in await queue.overview(2)] == made
    assert [(await queue.next_job()).id for _ in range(2)] == made
    await queue.recover()
    assert (await queue.next_job()).id == made[0]


async def test_a_job_of_higher_priority_is_taken_first(queue, spec):
    usual, low, high, other = [
        (await queue.create_job(replace(spec, priority=priority))).id for priority in (None, 1, 50, 50)
    ]
    assert (await queue.set_priority(low, 60)).priority == 60
    assert (await messages(queue, low))[-1] == "Priority set to 60"
    assert [(await queue.next_job()).id for _ in range(4)] == [low, high, other, usual]
    assert (await queue.set_priority(high, 2)).status == "running"
    assert (await queue.job(usual)).priority == 10
    for wrong in (0, 101):
        with pytest.raises(UsageError) as error:
            await queue.set_priority(usual, wrong)
        assert error.value.param == "priority"
    await queue.fail(high, "x", "y")
    with pytest.raises(Conflict, match="no longer matters"):
        await queue.set_priority(high, 3)


async def test_the_overview_never_loses_a_running_job_among_waiting_ones(queue, spec):
    running, ended, paused = [(await queue.create_job(spec)).id for _ in range(3)]
    waiting = [(await queue.create_job(spec)).id for _ in range(4)]
    await queue.next_job()
    await queue.cancel_job(ended)
    await queue.pause_job(paused)
    await queue.set_priority(waiting[2], 20)
    order = [running, waiting[2], waiting[0], waiting[1], waiting[3], paused, ended]
    assert [job.id for job in await queue.overview(10)] == order
    assert [job.id for job in await queue.overview(2)] == order[:2]


async def test_asking_for_a_job_looks_into_the_database_only_when_one_may_be_there(
    queue, database, spec, monkeypatch
):
    await queue.create_job(spec)
    assert await queue.next_job() is not None
    assert await queue.next_job() is None
    monkeypatch.setattr(database, "run", None)
    assert await queue.next_job() is None


async def test_a_job_that_succeeds_tells_its_story_and_leaves_an_adapter(queue, settings, spec):
    job = await queue.create_job(replace(spec, suffix="pirate"))
    await queue.next_job()
    await queue.begun(job.id, 0, 2)
    assert (await queue.job(job.id)).total_steps == 2
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


async def test_what_a_job_made_can_be_deleted_and_the_job_stays(queue, settings, spec):
    made = []
    for _ in range(2):
        job = await queue.create_job(spec)
        await queue.next_job()
        folder = settings.adapters / job.id
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        made.append(await queue.succeed(job.id, folder, 8))
    gone, kept = made
    await queue.delete_adapter(gone.fine_tuned_model)
    assert [adapter.job_id for adapter in await queue.adapters()] == [kept.id]
    assert sorted(path.name for path in settings.adapters.iterdir()) == [kept.id]
    assert (await queue.job(gone.id)).status == "succeeded"
    assert (await messages(queue, gone.id))[-1] == f"{gone.fine_tuned_model} was deleted"
    with pytest.raises(NotFound, match="was deleted; run the job again"):
        await queue.adapter_folder(gone.id)
    with pytest.raises(NotFound, match="no job has made"):
        await queue.delete_adapter(gone.fine_tuned_model)


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


async def test_no_job_is_taken_of_a_model_that_cannot_be_finetuned(database, settings, spec):
    queue = JobQueue(database, settings, model="tiny", obstacle="no adapters fit it")
    with pytest.raises(UsageError, match="no adapters fit it"):
        await queue.create_job(spec)


async def test_whoever_watches_is_told_what_is_wanted_of_a_job(queue, spec):
    heard: list[tuple[str, str, int]] = []
    queue.watch(lambda job: heard.append((job.id, job.status, job.priority)))
    job = await queue.create_job(spec)
    await queue.set_priority(job.id, 40)
    await queue.pause_job(job.id)
    await queue.resume_job(job.id)
    await queue.next_job()
    await queue.pause_job(job.id)
    assert heard == [(job.id, status, 40) for status in ("queued", "paused", "queued", "running")]


async def test_a_job_that_is_cancelled_while_it_waits_leaves_no_checkpoints(queue, settings, spec):
    job = await queue.create_job(spec)
    left = settings.checkpoints / job.id / "step-000002"
    left.mkdir(parents=True)
    await queue.cancel_job(job.id)
    assert not left.parent.exists()


async def test_the_checkpoints_of_a_running_job_stay_until_it_has_stopped(queue, settings, spec):
    job = await queue.create_job(spec)
    await queue.next_job()
    (settings.checkpoints / job.id).mkdir(parents=True)
    assert (await queue.cancel_job(job.id)).status == "running"
    assert (settings.checkpoints / job.id).is_dir()


async def test_a_database_that_cannot_be_asked_for_a_moment_loses_no_job(
    queue, spec, database, monkeypatch: pytest.MonkeyPatch
):
    job = await queue.create_job(spec)

    async def locked(work):
        raise ApplianceUnavailable("the database is locked")

    for ask in (queue.wait_for_job, queue.next_job):
        with monkeypatch.context() as failing:
            failing.setattr(database, "run", locked)
            with pytest.raises(ApplianceUnavailable):
                await ask()
        await asyncio.wait_for(queue.wait_for_job(), 5)
    assert (await queue.next_job()).id == job.id


async def test_how_far_a_job_is_when_it_begins_comes_with_its_row_of_that_moment(queue, spec):
    job = await queue.create_job(replace(spec, priority=10))
    await queue.next_job()
    await queue.set_priority(job.id, 90)
    begun = await queue.begun(job.id, 2, 30)
    assert (begun.priority, begun.step, begun.total_steps) == (90, 2, 30)
