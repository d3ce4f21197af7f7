"""What a check of `harli doctor` says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)
