"""The command line's `serve`: what its flags become, and the log of what it starts."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import structlog

from harli_appliance.cli import serve as serve_command
from harli_appliance.cli.main import run
from harli_appliance.config import Settings
from harli_appliance.serve import configure_logging
from tests.cli_rig import (  # noqa: F401  fixtures
    Out,
    apart,
    out,
)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `harli serve` would have become."""
    calls: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, arguments: calls.append(arguments))
    return calls


def test_serve_hands_its_flags_over(executed: list[list[str]]) -> None:
    flags = ["--port", "0", "--slo-tpot", "0.2s", "--policy", "time_slice", "--set", "memory.pool_slots=512"]
    flags.append("--calibrate")
    assert run(["serve", *flags]) == 0
    (arguments,) = executed
    assert arguments[1:3] == ["-m", "harli_appliance.serve"]
    pairs = set(zip(arguments[3::2], arguments[4::2], strict=True))
    assert pairs == {
        ("--set", "memory.pool_slots=512"),
        ("--set", "server.port=0"),
        ("--set", "slo.tpot_ms=200.0"),
        ("--set", "scheduling.policy=time_slice"),
        ("--set", "scheduling.calibration=always"),
    }


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--port", "99999"], "server.port"),
        (["--policy", "best"], "no such policy; choose one of adaptive, harli, naive, "),
        (["--config", "none.toml"], "no such file"),
        (["--set", "memory.pool_slot=5"], "did you mean 'memory.pool_slots'"),
        (["--slo-tpot", "fast"], "no duration"),
        (["--set", "memory"], "sets nothing"),
    ],
)
def test_serve_refuses_wrong_settings_before_anything_starts(
    executed: list[list[str]], out: Out, flags: list[str], word: str
) -> None:
    assert run(["serve", *flags]) == 2
    assert word in " ".join(out()[1].split())
    assert executed == []


@pytest.mark.parametrize(("text", "ms"), [("200ms", 200), ("200", 200), ("0.2s", 200), (" 1.5 s", 1500)])
def test_durations(text: str, ms: float) -> None:
    assert serve_command.parse_ms(text) == ms


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    configure_logging(Settings(home=tmp_path))
    try:
        structlog.get_logger("test").error("nobody hears this", exc_info=ValueError("broken"))
    finally:
        structlog.reset_defaults()
