"""Measurements in sections: each is guarded, so that one that fails does not lose the others.

The JSON file is written again after every section: a machine that is taken away leaves what was measured. Knows
neither devices nor units.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Section = Callable[[], Any]
"""Measures something and returns what JSON can hold."""


def run_sections(
    sections: Mapping[str, Section], out: Path, header: Mapping[str, Any], *, budget_s: float
) -> dict[str, Any]:
    """Run sections in order, for as long as there is time.

    Args:
        out: the JSON file.
        header: what the file says beside the sections.
        budget_s: no section begins later than this; those left out are said to be.

    Returns:
        What the file holds: `header`, and under ``sections`` of each ``ok``, ``seconds``, ``data`` or ``error``.
    """
    report: dict[str, Any] = {**header, "sections": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    for name, measure in sections.items():
        started = time.perf_counter()
        if started - begun > budget_s:
            result: dict[str, Any] = {"ok": False, "error": f"left out: {budget_s:.0f} s were over"}
        else:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            try:
                result = {"ok": True, "data": measure()}
            except Exception as error:
                result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.perf_counter() - started, 2)
        report["sections"][name] = result
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
