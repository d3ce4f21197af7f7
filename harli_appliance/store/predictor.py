"""What calibration learned, kept for each device, model and version, so that the next start can skip it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from sqlite_utils import Database

_KEY = "device = ? AND model = ? AND version = ?"


def save_predictor(db: Database, device: str, model: str, version: str, data: Mapping[str, Any]) -> None:
    """Keep `data` (JSON, finite numbers only), in place of what was kept under the same key."""
    db.table("predictor").upsert(
        {
            "device": device,
            "model": model,
            "version": version,
            "data": json.dumps(dict(data), allow_nan=False),
            "updated_at": int(time.time()),
        },
        pk=("device", "model", "version"),
    )


def load_predictor(db: Database, device: str, model: str, version: str) -> dict[str, Any] | None:
    """What was kept, or None."""
    row = next(db.table("predictor").rows_where(_KEY, [device, model, version]), None)
    if row is None:
        return None
    data: dict[str, Any] = json.loads(row["data"])
    return data
