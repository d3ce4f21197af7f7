"""`harli serve`: check the settings here, then become the process that serves.

Knows flags and settings. Does not know torch: the process is replaced before anything heavy is loaded.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harli_appliance.scheduling.names import POLICY_NAMES

MODULE = "harli_appliance.serve"


def parse_ms(text: str) -> float:
    """Milliseconds from "200ms", "0.2s" or "200"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)?\s*", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"'{text}' is no duration; write e.g. 200ms")
    return float(found[1]) * (1000.0 if found[2] == "s" else 1.0)


def parse_assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(
            f"'{text}' sets nothing; write e.g. memory.pool_slots=8192", param_hint="--set"
        )
    return key.strip(), value


def nested(assignments: dict[str, str]) -> dict[str, Any]:
    """{"server.port": "1"} as {"server": {"port": "1"}}."""
    tree: dict[str, Any] = {}
    for key, value in assignments.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(f"'{key}' is inside a setting that has a value", param_hint="--set")
        place[name] = value
    return tree


def serve(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings; ./harli.toml when not given.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face folder, or a name that 'harli models' lists.")
    ] = None,
    slo_tpot: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Promised time per output token, e.g. 200ms."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(POLICY_NAMES)}.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this device again before serving.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; may be given several times."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write logs as JSON lines.")] = False,
) -> None:
    """Serve a model, and finetune it in the time that is left."""
    assignments = dict(parse_assignment(text) for text in set_ or [])
    named = {
        "server.host": host,
        "server.port": port,
        "model.path": model,
        "slo.tpot_ms": None if slo_tpot is None else parse_ms(slo_tpot),
        "scheduling.policy": policy,
        "scheduling.calibration": "always" if calibrate else None,
        "logging.json_lines": "true" if json else None,
    }
    assignments |= {key: str(value) for key, value in named.items() if value is not None}

    from harli_appliance.config import load_settings

    load_settings(config, **nested(assignments))
    arguments = [sys.executable, "-m", MODULE]
    if config is not None:
        arguments += ["--config", str(config)]
    for key, value in assignments.items():
        arguments += ["--set", f"{key}={value}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, arguments)  # noqa: S606 - our own module, without a shell
