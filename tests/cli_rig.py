"""The command line in this process, against a fake appliance on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import FakeAppliance, listening

ROOT = Path(__file__).parent.parent
LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the person who runs the tests."""
    for name in ("HARLI_URL", "HARLI_API_KEY", "HARLI_SERVER__PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HARLI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAppliance]:
    """A fake appliance on a thread of its own; HARLI_URL points to it."""
    folder = tmp_path / "appliance"
    folder.mkdir()
    appliance = FakeAppliance(folder)
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    address: list[str] = []

    async def live() -> None:
        async with listening(appliance) as listener:
            address.append(listener.url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    assert started.wait(10)
    monkeypatch.setenv("HARLI_URL", address[0])
    yield appliance
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


Out = Callable[[], tuple[str, str]]


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Out:
    """What went to stdout and stderr since the last call."""
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(LINE)
    return path
