"""Random mixes on a model of its own: ``python -m tests.mix_child MODEL COUNT`` prints what they exercised."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import tests.conftest  # noqa: F401  stand-ins and thread limits, before transformers
from tests.mixes import ADAPTERS, Bench, Judge, check_mixes, save_random_adapter

CHUNK = 64


def main() -> None:
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM

    from harli_appliance.runtime.arguments import RuntimeOptions
    from harli_appliance.runtime.kv import SglangSlots
    from harli_appliance.runtime.sglang_runtime import SglangRuntime

    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    # A small pool: requests wait for one another, and cached prefixes are evicted.
    options = RuntimeOptions(
        folder, pool_slots=1536, max_lora_rank=8, max_adapters=2, chunked_prefill_tokens=CHUNK
    )
    runtime = SglangRuntime(options)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    folders = {name: folder / name for name in ADAPTERS}
    for seed, (name, path) in enumerate(folders.items()):
        save_random_adapter(reference, path, seed)
        runtime.load_adapter(name, runtime.read_adapter(name, str(path)))
    bench = Bench(runtime, SglangSlots(runtime), Judge(reference, folders), CHUNK)
    print(json.dumps(check_mixes(bench, count)))


if __name__ == "__main__":
    main()
