"""Ids in OpenAI's style, e.g. ``ftjob-3f0c...``: unguessable, and telling what they name."""

from __future__ import annotations

import secrets
from typing import Literal


def new_id(kind: Literal["file", "ftjob", "ftevent"]) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def bindable(claimed: str) -> str:
    """An id from outside as SQLite takes it: lone surrogates, which it refuses, become question marks."""
    return claimed.encode("utf-8", "replace").decode()
