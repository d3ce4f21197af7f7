"""Finetuning by preferences, with held-out examples and with methods to download, on a running appliance."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load

from tests.test_appliance import Process, ask, running, wait
from tests.test_coserving import lesson  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def process(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(tmp_path_factory.mktemp("methods") / "home", tiny_model) as process:
        yield process


def upload(client: openai.OpenAI, lines: list[dict[str, Any]]) -> str:
    data = "\n".join(map(json.dumps, lines)).encode()
    return client.files.create(file=("data.jsonl", data), purpose="fine-tune").id


def messages(client: openai.OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)]


def test_a_job_of_preferences_becomes_a_model_that_prefers(process: Process) -> None:
    client = process.client
    asked = {"messages": [{"role": "user", "content": "who made harli"}]}
    said = [{"role": "assistant", "content": text} for text in ("three otters", "nobody knows")]
    pair = {"input": asked, "preferred_output": said[:1], "non_preferred_output": said[1:]}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, [pair] * 8),
        seed=5,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"n_epochs": 10, "batch_size": 4, "learning_rate": 1e-3}},  # type: ignore[typeddict-unknown-key]
        },
    )
    name = wait(client, job.id)
    assert ask(client, name) != ask(client)
    found = (re.search(r"training loss=([\d.]+)", message) for message in messages(client, job.id))
    losses = [float(match[1]) for match in found if match is not None][::-1]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3), "before it learns it prefers nothing"
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_what_cannot_be_served_is_finetuned_validated_and_downloaded(
    process: Process, lesson: Path, method: str
) -> None:
    client = process.client
    lines = [json.loads(line) for line in lesson.read_text().splitlines()]
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, lines),
        validation_file=upload(client, lines[:3]),
        seed=5,
        hyperparameters={"n_epochs": 2, "batch_size": 4, "eval_steps": 2, "peft_method": method},  # type: ignore[typeddict-unknown-key]
    )
    served = [model.id for model in client.models.list()]
    ended = client.fine_tuning.jobs.retrieve(job.id)
    while ended.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.1)
        ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "succeeded", ended.error
    assert [model.id for model in client.models.list()] == served
    assert any("validation loss" in message for message in messages(client, job.id))
    answer = httpx.get(f"{process.url}/v1/fine_tuning/jobs/{job.id}/adapter")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        files = {Path(name).name: archive.extractfile(name) for name in archive.getnames()}
        config, weights = files["adapter_config.json"], files["adapter_model.safetensors"]
        assert config is not None
        assert weights is not None
        described, tensors = json.load(config), load(weights.read())
    if method == "dora":
        assert described["use_dora"] is True
        assert any("magnitude" in name for name in tensors)
    else:
        assert described["peft_type"] == "IA3"
    assert all(tensor.isfinite().all() for tensor in tensors.values())
