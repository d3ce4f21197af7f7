"""The self-check at start: what SGLang must have, told by name when it has not."""

from __future__ import annotations

import importlib.metadata

import pytest

from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.runtime import internals

pytestmark = pytest.mark.filterwarnings("ignore")  # importing SGLang warns of its own affairs


def test_the_installed_sglang_has_everything() -> None:
    internals.check()


@pytest.mark.parametrize(
    "name",
    [
        "sglang.srt.managers.scheduler:Scheduler.no_such_method",
        "sglang.srt.managers.scheduler:NoSuchClass",
        "sglang.srt.no_such_module:Thing",
    ],
)
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(ApplianceUnavailable, match=r"no_such|NoSuch") as refusal:
        internals.check((*internals.RELIED_ON, name))
    assert "make setup" in refusal.value.message


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9.9")
    with pytest.raises(ApplianceUnavailable, match=r"0\.9\.9 is installed.*0\.5\.21"):
        internals.check()
