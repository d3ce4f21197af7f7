"""`harli serve`: check the settings here, then become the process that serves.

Knows flags and settings. Does not know torch: the process is replaced before anything heavy is loaded.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.scheduling.names import POLICY_NAMES

MODULE = "harli_appliance.serve"


def parse_ms(text: str) -> float:
    """Milliseconds from "200ms", "0.2s" or "200"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)?\s*", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"'{text}' is no duration; write e.g. 200ms")
    return float(found[1]) * (1000.0 if found[2] == "s" else 1.0)


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
    named = {
        "server.host": host,
        "server.port": port,
        "model.path": model,
        "slo.tpot_ms": None if slo_tpot is None else parse_ms(slo_tpot),
        "scheduling.policy": policy,
        "scheduling.calibration": "always" if calibrate else None,
        "logging.json_lines": "true" if json else None,
    }
    flags = [f"{key}={value}" for key, value in named.items() if value is not None]
    assignments = [*(set_ or []), *flags]

    from harli_appliance.config import assigned, load_settings

    load_settings(config, **assigned(assignments))
    arguments = [sys.executable, "-m", MODULE]
    if config is not None:
        arguments += ["--config", str(config)]
    for assignment in assignments:
        arguments += ["--set", assignment]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, arguments)  # noqa: S606 - our own module, without a shell
