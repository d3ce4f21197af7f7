"""One part of a measurement in a process of its own: started, awaited, and its one line of JSON read.

Knows processes; does not know what is measured. Imports neither torch nor SGLang.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harli_appliance.errors import HarliError

SHOWN_LINES = 20
"""Of the log of a measurement that failed."""


def measure_part(
    command: Sequence[str], arguments: Sequence[str], log: Path, more: Mapping[str, str] | None = None
) -> Any:
    """What a process says in its last line of output, on one thread.

    Args:
        log: gets its messages.
        more: variables of its environment.

    Raises:
        HarliError: it failed; the end of its log comes as notes.
    """
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(more or {})}
    with log.open("w", encoding="utf-8") as messages:
        ended = subprocess.run(  # noqa: S603 - our own module
            [*command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            check=False,
        )
    if ended.returncode != 0 or not ended.stdout.strip():
        error = HarliError(
            f"the measurement {arguments[0]!r} ended with status {ended.returncode}; see {log}"
        )
        for line in log.read_text(encoding="utf-8").splitlines()[-SHOWN_LINES:]:
            error.add_note(line)
        raise error
    return json.loads(ended.stdout.splitlines()[-1])
