"""The process in which a part of ``harli bench training`` is measured, so that nothing else is in its memory.

``python -m harli_appliance.bench.training_child PART FOLDER TOKENS`` prints what was measured as one line of JSON,
the last on stdout. PART is a contender, whose memory is measured, or ``speed``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from harli_appliance.runtime import cpu_stand_ins

SPEED = "speed"
ROUNDS = 15
"""On a shared machine two steps of one contender differ by a tenth."""


def measure(part: str, folder: Path, tokens: int) -> Mapping[str, float | list[float]]:
    # Stand-ins first: transformers trips over what is missing without a GPU.
    cpu_stand_ins.install()
    import torch

    from harli_appliance.bench.training_parts import memory, speed

    torch.set_num_threads(1)  # as on the training lane of the appliance
    return speed(folder, tokens, ROUNDS) if part == SPEED else memory(folder, part, tokens)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))), flush=True)
