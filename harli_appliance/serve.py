"""The process that ``harli serve`` becomes: settings, appliance, HTTP, until a signal.

Prints one line of JSON on stdout when it serves, ``{"event": "ready", "url": ...}``; everything else goes to
stderr. Runs as ``python -m harli_appliance.serve [--config FILE] [--set section.key=VALUE ...]``.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from harli_appliance.config import Settings, assigned, load_settings
from harli_appliance.errors import HarliError


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM; the exit code is the error's."""
    parser = argparse.ArgumentParser(prog="harli serve", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=VALUE", dest="settings")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config, **assigned(options.settings))
        configure_logging(settings)
        _limit_threads()
        return asyncio.run(_serve(settings))
    except HarliError as error:
        print(f"harli: {error.message}", file=sys.stderr)
        return error.exit_code


def configure_logging(settings: Settings) -> None:
    """Structured lines on stderr, at the level and in the form that is set."""
    level = getattr(logging, settings.logging.level.upper())
    renderer: Any = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    if settings.logging.json_lines:
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(Stderr()),  # type: ignore[arg-type]
    )
    # While it starts, SGLang warns of what a CPU does not have; once it serves, its warnings matter.
    logging.getLogger("sglang").setLevel(logging.ERROR)


class Stderr:
    """stderr as the log writes it: its reader may be gone or its disk full, and nothing may end for that."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def _limit_threads() -> None:
    """One OpenMP thread a lane, and no progress bars of others on our stderr; before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


async def _serve(settings: Settings) -> int:
    from harli_appliance.device.choose import choose_gpu

    if choose_gpu(settings.device.kind) is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch and SGLang look for a GPU when they are imported
    # Stand-ins first: transformers, too, trips over a torchvision whose operators cannot load.
    from harli_appliance.runtime import cpu_stand_ins

    cpu_stand_ins.install()
    from harli_appliance.api.app import create_app
    from harli_appliance.api.server import serve
    from harli_appliance.appliance import Appliance

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log = structlog.get_logger("harli_appliance")
    appliance = await Appliance.open(settings)
    try:
        listener = await serve(create_app(appliance, settings), settings.server.host, settings.server.port)
        try:
            log.info("loading the model", model=settings.model.path, url=listener.url)
            starting = asyncio.create_task(appliance.start(calibration_teller()))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                # Loading cannot be interrupted, and nothing that is kept has been opened for writing by it.
                log.info("stopped while loading")
                os._exit(0)
            await starting
            logging.getLogger("sglang").setLevel(logging.WARNING)
            print(json.dumps({"event": "ready", "url": listener.url}), flush=True)
            log.info("ready", url=listener.url)
            await stopped
            log.info("stopping")
        finally:
            await listener.close()
    finally:
        await appliance.close()
    return 0


def calibration_teller() -> Callable[[float], None]:
    """Says how far a calibration is: a progress bar where a person looks, else a line at each quarter."""
    log = structlog.get_logger("harli_appliance")
    if not sys.stderr.isatty():
        told = -1

        def tell(share: float) -> None:
            nonlocal told
            if int(4 * share) > told:
                told = int(4 * share)
                log.info("measuring the device", done=f"{share:.0%}")

        return tell
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("measuring the device", total=1.0)

    def draw(share: float) -> None:
        progress.start()
        progress.update(task, completed=share)
        if share >= 1.0:
            progress.stop()

    return draw


if __name__ == "__main__":
    code = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    Stderr().flush()
    os._exit(code)  # to take torch and SGLang apart would take seconds, which a supervisor may not give
