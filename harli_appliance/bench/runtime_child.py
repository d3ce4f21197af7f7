"""The process in which one model is measured: SGLang can be started once in a process.

``python -m harli_appliance.bench.runtime_child {tiny,smollm2} FOLDER SCRATCH`` prints its measurements as one line
of JSON, the last on stdout; messages of SGLang go to stderr.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

from harli_appliance.runtime import cpu_stand_ins


def measure(part: str, folder: Path, scratch: Path) -> dict[str, Any]:
    # Stand-ins first: transformers and SGLang trip over what is missing without a GPU.
    cpu_stand_ins.install()
    import torch

    from harli_appliance.bench.runtime_parts import (
        MIXED,
        attention_steps,
        few_steps,
        hotload,
        overhead,
        prefix,
    )
    from harli_appliance.bench.runtime_plain import write_tiny_model
    from harli_appliance.bench.runtime_rig import Bench

    torch.set_num_threads(1)  # as in the appliance
    logging.getLogger("sglang.srt.models.registry").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    if part == "tiny":
        write_tiny_model(folder)
        bench = Bench.start(folder, pool_slots=24_576)
        gc.collect()
        found["overhead"] = asyncio.run(overhead(bench))
        found["prefix"] = asyncio.run(prefix(bench))
        found["attention"] = attention_steps(bench, requests=32, rounds=4, plain=True)
    else:
        bench = Bench.start(folder, pool_slots=16_384)
        gc.collect()
        found["attention"] = attention_steps(bench, requests=16, rounds=3, lengths=MIXED)
        found["attention_short"] = attention_steps(bench, requests=16, rounds=3)
        found["few"] = few_steps(bench)
        found["hotload"] = asyncio.run(hotload(bench, scratch / "adapter"))
    bench.lane.close()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))), flush=True)
