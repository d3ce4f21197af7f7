"""A job queue on a data directory of its own, for the tests of the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from harli_appliance.api.ports import JobSpec
from harli_appliance.config import Settings, load_settings
from harli_appliance.store.database import Database
from harli_appliance.training.queue import JobQueue

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
