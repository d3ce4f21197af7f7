"""Files and fine-tuning jobs through the unmodified openai client."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import httpx
import openai
import pytest

from harli_appliance.api.files import FileRoutes
from tests.fakes import BASE, FakeAppliance, listening

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
async def url(port: FakeAppliance) -> AsyncIterator[str]:
    async with listening(port, max_upload_mib=1) as listener:
        yield listener.url


def leftovers(port: FakeAppliance) -> list[Path]:
    return list((port.folder / "home" / "uploads").glob("*"))


async def upload(client: openai.AsyncOpenAI, content: bytes = LINE, name: str = "train.jsonl") -> str:
    return (await client.files.create(file=(name, content), purpose="fine-tune")).id


async def test_a_file_goes_up_comes_back_and_is_deleted(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    created = await client.files.create(file=("train.jsonl", LINE), purpose="fine-tune")
    assert (created.filename, created.bytes, created.status) == ("train.jsonl", len(LINE), "processed")
    assert leftovers(port) == []
    assert (await client.files.retrieve(created.id)).purpose == "fine-tune"
    assert (await client.files.content(created.id)).content == LINE
    assert [file.id async for file in client.files.list()] == [created.id]
    assert (await client.files.delete(created.id)).deleted is True
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(created.id)


async def test_files_are_paged_filtered_and_ordered(client: openai.AsyncOpenAI) -> None:
    ids = [await upload(client) for _ in range(3)]
    page = await client.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == ([ids[2], ids[1]], True)
    assert [file.id async for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id async for file in client.files.list(order="asc")] == ids
    assert [file.id async for file in client.files.list(purpose="batch")] == []
    with pytest.raises(openai.NotFoundError):
        await client.files.list(after="file-none")


async def test_a_malformed_training_file_is_refused_with_its_findings(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await upload(client, b"broken\n")
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "file")
    finding = {"line": 3, "code": "invalid_json", "message": "line 3: no JSON"}
    assert caught.value.body["findings"] == [finding]  # type: ignore[index]
    assert port.stored == {}
    assert leftovers(port) == []


async def test_an_upload_beyond_the_limit_is_refused_and_leaves_nothing(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await upload(client, b"x" * ((1 << 20) + 1))
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert leftovers(port) == []


async def test_a_full_disk_is_said_and_nothing_is_left(
    http: aiohttp.ClientSession, port: FakeAppliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileRoutes, "_save", full)
    form = aiohttp.FormData({"purpose": "fine-tune"}, default_to_multipart=True)
    form.add_field("file", LINE, filename="a.jsonl")
    async with http.post("/v1/files", data=form) as response:
        assert response.status == 503
        error = (await response.json())["error"]
    assert error["code"] == "storage_unavailable"
    assert "No space left on device; make room there" in error["message"]
    assert leftovers(port) == []


@pytest.mark.parametrize("purpose", ["batch", "assistants"])
async def test_other_purposes_are_refused(client: openai.AsyncOpenAI, purpose: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.create(file=("a.jsonl", LINE), purpose=purpose)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "purpose")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("../../etc/passwd", "passwd"), ("C:\\data\\a.jsonl", "a.jsonl"), ("..", "upload.jsonl")],
)
async def test_a_filename_is_only_a_name(client: openai.AsyncOpenAI, name: str, kept: str) -> None:
    created = await client.files.create(file=(name, LINE), purpose="fine-tune")
    assert created.filename == kept


async def test_form_faults_are_named(http: aiohttp.ClientSession, port: FakeAppliance) -> None:
    async def post(**fields: str) -> str:
        form = aiohttp.FormData(default_to_multipart=True)
        for name, value in fields.items():
            form.add_field(name, value)
        async with http.post("/v1/files", data=form) as response:
            assert response.status == 400
            return (await response.json())["error"]["param"]

    assert await post(purpose="fine-tune") == "file"
    assert await post(file=LINE.decode()) == "purpose"
    assert await post(file=LINE.decode(), purpose="fine-tune", expires_after="1") == "expires_after"
    assert await post(file=LINE.decode(), purpose="p" * 5000) == "purpose"
    async with http.post("/v1/files", json={"file": "x"}) as response:
        assert (await response.json())["error"]["code"] == "invalid_content_type"
    headers = {"Content-Type": "multipart/form-data; boundary=X"}
    part = b"--X\r\nContent-Disposition: form-data; name=file\r\n"
    for body in (
        b"not a form",
        part + b"\r\nabc",
        part + b"no header\r\n\r\nabc\r\n--X--\r\n",
        part + b"X-Long: " + b"x" * 10_000 + b"\r\n\r\nabc\r\n--X--\r\n",
        part + b"X-More: x\r\n" * 500 + b"\r\nabc\r\n--X--\r\n",
    ):
        async with http.post("/v1/files", data=body, headers=headers) as response:
            assert response.status == 400, await response.text()
            assert (await response.json())["error"]["code"] == "invalid_multipart"
    assert port.stored == {}
    assert leftovers(port) == []


async def test_a_job_with_the_method_of_today(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    file_id = await upload(client)
    job = await client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file_id,
        suffix="harbour",
        seed=7,
        metadata={"team": "docs"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {  # type: ignore[typeddict-unknown-key]
                    "n_epochs": 2,
                    "batch_size": "auto",
                    "learning_rate_multiplier": "auto",
                    "learning_rate": 1e-3,
                    "lora_rank": 4,
                    "lora_alpha": 8,
                    "use_rslora": True,
                    "lora_dropout": 0.1,
                    "peft_method": "dora",
                    "target_modules": ["q_proj", "v_proj"],
                    "lr_scheduler_type": "constant",
                    "warmup_ratio": 0.25,
                    "max_grad_norm": 0.5,
                    "eval_steps": 5,
                    "early_stopping_patience": 3,
                }
            },
        },
    )
    spec = port.specs[0]
    assert (spec.n_epochs, spec.batch_size, spec.learning_rate) == (2, None, 1e-3)
    assert (spec.lora_rank, spec.lora_alpha, spec.suffix, spec.seed) == (4, 8.0, "harbour", 7)
    assert (spec.use_rslora, spec.lora_dropout) == (True, 0.1)
    assert (spec.peft_method, spec.target_modules) == ("dora", ("q_proj", "v_proj"))
    assert (spec.lr_scheduler_type, spec.warmup_ratio, spec.max_grad_norm) == ("constant", 0.25, 0.5)
    assert (job.status, job.seed, job.metadata) == ("queued", 7, {"team": "docs"})
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == 4
    assert job.hyperparameters.model_extra == {
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "peft_method": "dora",
        "target_modules": ["q_proj", "v_proj"],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.25,
        "max_grad_norm": 0.5,
        "eval_steps": 5,
        "early_stopping_patience": 3,
    }
    assert job.method is not None
    assert job.method.type == "supervised"
    assert (job.result_files, job.trained_tokens, job.error) == ([], None, None)


async def test_a_job_that_learns_preferences(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    file_id = await upload(client)
    job = await client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file_id,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1, "batch_size": "auto"}},
        },
    )
    assert (port.specs[0].method, port.specs[0].beta, port.specs[0].n_epochs) == ("dpo", 0.2, 1)
    assert job.method is not None
    assert job.method.type == "dpo"
    assert job.method.supervised is None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2


async def test_a_job_with_the_older_hyperparameters(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    file_id = await upload(client)
    await client.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, hyperparameters={"n_epochs": "auto", "batch_size": 2}
    )
    assert (port.specs[0].n_epochs, port.specs[0].batch_size) == (None, 2)


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"lora_rank": 4}, "unknown parameter 'lora_rank': write it as 'hyperparameters.lora_rank'"),
        (
            {"hyperparameters": {"beta": 0.1}},
            "unknown parameter 'hyperparameters.beta': write it as 'method.dpo.hyperparameters.beta'",
        ),
        ({"sufix": "x"}, "unknown parameter 'sufix': did you mean 'suffix'?"),
    ],
)
async def test_a_hyperparameter_in_the_wrong_place_is_told_the_right_one(
    http: aiohttp.ClientSession, fields: dict[str, object], hint: str
) -> None:
    body = {"model": "m", "training_file": "file-1", **fields}
    async with http.post("/v1/fine_tuning/jobs", json=body) as response:
        assert (await response.json())["error"]["message"] == hint


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        (
            {"hyperparameters": {"learning_rate_multiplier": 2.0}},
            "unsupported_parameter",
            "hyperparameters.learning_rate_multiplier",
        ),
        ({"method": {"type": "reinforcement"}}, "unsupported_parameter", "method.type"),
        ({"method": {"type": "ppo"}}, "invalid_request", "method.type"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}},
            "invalid_request",
            "method.dpo.hyperparameters.beta",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
            "unknown_parameter",
            "method.supervised.hyperparameters.beta",
        ),
        ({"method": {"type": "dpo", "supervised": {}}}, "invalid_request", "method.supervised"),
        ({"validation_file": ""}, "invalid_request", "validation_file"),
        ({"hyperparameters": {"eval_steps": 0}}, "invalid_request", "hyperparameters.eval_steps"),
        ({"integrations": [{"type": "wandb"}]}, "unsupported_parameter", "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "invalid_request", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"learning_rate": 2}}, "invalid_request", "hyperparameters.learning_rate"),
        ({"hyperparameters": {"lora_dropout": 1.0}}, "invalid_request", "hyperparameters.lora_dropout"),
        ({"hyperparameters": {"use_rslora": 1}}, "invalid_request", "hyperparameters.use_rslora"),
        (
            {"hyperparameters": {"lr_scheduler_type": "step"}},
            "invalid_request",
            "hyperparameters.lr_scheduler_type",
        ),
        ({"hyperparameters": {"peft_method": "prefix"}}, "invalid_request", "hyperparameters.peft_method"),
        ({"hyperparameters": {"target_modules": []}}, "invalid_request", "hyperparameters.target_modules"),
        (
            {"hyperparameters": {"target_modules": ["q_proj", "lm_head"]}},
            "invalid_request",
            "hyperparameters.target_modules.1",
        ),
        ({"hyperparameters": {"warmup_ratio": -0.1}}, "invalid_request", "hyperparameters.warmup_ratio"),
        ({"hyperparameters": {"max_grad_norm": 1e4}}, "invalid_request", "hyperparameters.max_grad_norm"),
        ({"hyperparameters": {"lora_ranks": 2}}, "unknown_parameter", "hyperparameters.lora_ranks"),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "invalid_request", "hyperparameters"),
        ({"suffix": "no spaces"}, "invalid_request", "suffix"),
        ({"suffix": "x" * 65}, "invalid_request", "suffix"),
        ({"seed": -1}, "invalid_request", "seed"),
        ({"metadata": {"a": 1}}, "invalid_request", "metadata.a"),
        ({"training_file": None}, "invalid_request", "training_file"),
    ],
)
async def test_wrong_jobs_are_refused_and_named(
    http: aiohttp.ClientSession, port: FakeAppliance, fields: dict[str, object], code: str, param: str
) -> None:
    body = {"model": BASE, "training_file": "file-0", **fields}
    async with http.post("/v1/fine_tuning/jobs", json=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert port.specs == []


async def test_the_multiplier_is_refused_with_the_way_out(http: aiohttp.ClientSession) -> None:
    body = {"model": BASE, "training_file": "f", "hyperparameters": {"learning_rate_multiplier": 0.1}}
    async with http.post("/v1/fine_tuning/jobs", json=body) as response:
        assert "give 'learning_rate'" in (await response.json())["error"]["message"]


async def test_jobs_and_events_are_paged_newest_first(
    client: openai.AsyncOpenAI, port: FakeAppliance
) -> None:
    file_id = await upload(client)
    for _ in range(3):
        await client.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    page = await client.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in page.data], page.has_more) == (["ftjob-2", "ftjob-1"], True)
    assert [job.id async for job in client.fine_tuning.jobs.list(limit=2)] == [
        "ftjob-2",
        "ftjob-1",
        "ftjob-0",
    ]
    port.happen("ftjob-0", "step 1", step=1, loss=2.5)
    events = [event async for event in client.fine_tuning.jobs.list_events("ftjob-0", limit=1)]
    assert [(event.message, event.type) for event in events] == [
        ("step 1", "metrics"),
        ("job created", "message"),
    ]
    assert events[0].data == {"step": 1, "loss": 2.5}


async def test_ended_jobs_say_what_became_of_them(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    file_id = await upload(client)
    for _ in range(2):
        await client.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    port.update("ftjob-0", status="succeeded", trained_tokens=900, fine_tuned_model="ft:x", finished_at=1)
    port.update("ftjob-1", status="failed", error_code="diverged", error_message="the loss is NaN")
    done = await client.fine_tuning.jobs.retrieve("ftjob-0")
    assert (done.trained_tokens, done.fine_tuned_model, done.error) == (900, "ft:x", None)
    failed = await client.fine_tuning.jobs.retrieve("ftjob-1")
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("diverged", "the loss is NaN")


async def test_cancelling(
    client: openai.AsyncOpenAI, http: aiohttp.ClientSession, port: FakeAppliance
) -> None:
    file_id = await upload(client)
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    port.update(job.id, status="succeeded")
    with pytest.raises(openai.ConflictError) as caught:
        await client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    async with http.post(f"/v1/fine_tuning/jobs/{job.id}/cancel", data=json.dumps({"a": 1})) as response:
        assert response.status == 400


async def test_priority(client: openai.AsyncOpenAI, http: aiohttp.ClientSession, port: FakeAppliance) -> None:
    file_id = await upload(client)
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file_id, extra_body={"priority": 30})
    assert (port.specs[0].priority, job.harli["priority"]) == (30, 30)  # type: ignore[attr-defined]
    path = f"/harli/v1/jobs/{job.id}/priority"
    async with http.post(path, json={"priority": 40}) as response:
        assert (await response.json())["harli"]["priority"] == 40
    for wrong in ({"priority": 0}, {"priority": 101}, {"priority": "high"}, {}):
        async with http.post(path, json=wrong) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "priority"
    port.update(job.id, status="cancelled")
    async with http.post(path, json={"priority": 1}) as response:
        assert response.status == 409
    with pytest.raises(openai.BadRequestError):
        await client.fine_tuning.jobs.create(model=BASE, training_file=file_id, extra_body={"priority": 101})


async def test_pausing_and_resuming(
    client: openai.AsyncOpenAI, http: aiohttp.ClientSession, port: FakeAppliance
) -> None:
    file_id = await upload(client)
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    with pytest.raises(openai.ConflictError):
        await client.fine_tuning.jobs.resume(job.id)
    assert (await client.fine_tuning.jobs.pause(job.id)).status == "paused"
    assert (await client.fine_tuning.jobs.retrieve(job.id)).trained_tokens is None
    assert (await client.fine_tuning.jobs.resume(job.id)).status == "queued"
    port.update(job.id, status="failed", error_code="x", error_message="y")
    with pytest.raises(openai.ConflictError):
        await client.fine_tuning.jobs.pause(job.id)
    for action in ("pause", "resume"):
        path = f"/v1/fine_tuning/jobs/{job.id}/{action}"
        async with http.post(path, data=json.dumps({"a": 1})) as response:
            assert response.status == 400
            assert f"{action} takes no body" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "metadata[a]=b", "order=asc"])
async def test_wrong_queries_are_refused(http: aiohttp.ClientSession, query: str) -> None:
    async with http.get(f"/v1/fine_tuning/jobs?{query}") as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == query.split("=")[0]


async def test_what_does_not_exist_is_404(client: openai.AsyncOpenAI) -> None:
    for call in (
        client.fine_tuning.jobs.retrieve("ftjob-none"),
        client.fine_tuning.jobs.cancel("ftjob-none"),
        client.fine_tuning.jobs.pause("ftjob-none"),
        client.fine_tuning.jobs.resume("ftjob-none"),
        client.files.content("file-none"),
        client.files.delete("file-none"),
    ):
        with pytest.raises(openai.NotFoundError):
            await call


async def test_the_adapter_of_a_job_comes_as_a_tar(client: openai.AsyncOpenAI, port: FakeAppliance) -> None:
    uploaded = await client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=uploaded.id)
    path = f"/fine_tuning/jobs/{job.id}/adapter"
    with pytest.raises(openai.ConflictError):
        await client.get(path, cast_to=bytes)
    port.update(job.id, status="succeeded", finished_at=1_790_000_500, fine_tuned_model="ft:1")
    folder = port.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    answer = await client.get(path, cast_to=httpx.Response)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        found = archive.extractfile("adapter_model.safetensors")
        assert found is not None
        assert found.read() == b"weights"
