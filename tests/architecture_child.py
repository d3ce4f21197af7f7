"""Architectures on real SGLang, each in a process of its own: ``python -m tests.architecture_child MODEL...``.

SGLang can be started once in a process, so this one imports it and then forks for each model folder. What is to
be known about a model is found in one run and written to findings.json in its folder, for `test_architectures.py`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  stand-ins and thread limits, before transformers
from tests.greedy import Answer, wrong_tokens

PROMPTS = (1, 5, 30, 70, 110)
STEPS = 3
POOL = 2048


def serve(runtime: Any, asked: dict[str, tuple[list[int], str | None]], count: int) -> dict[str, list[int]]:
    """Answer (prompt, adapter) pairs in one go."""
    from harli_appliance.runtime.protocol import Sampling, Submission

    for name, (tokens, adapter) in asked.items():
        runtime.submit(Submission(name, tokens, Sampling(max_tokens=count, ignore_eos=True), adapter))
    answers: dict[str, list[int]] = {name: [] for name in asked}
    while (plan := runtime.plan()) is not None:
        for item in runtime.execute(plan).tokens:
            answers[item.request] += item.tokens
    return answers


def train(backbone: Any, adapter: Any, slots: Any) -> list[float]:
    """A few optimizer steps in rows leased from SGLang; the error of each step's gradients against PEFT's."""
    import torch

    from harli_appliance.training.activations import footprint
    from harli_appliance.training.objectives import Likelihood
    from harli_appliance.training.packing import pack
    from harli_appliance.training.units import MicroBatch
    from tests.test_units import by_backpropagation, examples, zeros

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2, weight_decay=0.0)
    errors = []
    for step in range(STEPS):
        data = examples(step, (70, 9, 33, 50))
        learned = sum(example.learned_tokens for example in data)
        _, wanted = by_backpropagation(adapter, data)
        layers = zeros(backbone, adapter)
        for sequence in pack(data, 100):
            needed = footprint(backbone, len(sequence)).slots
            leased = slots.take(needed, evict=needed)
            batch = MicroBatch(
                backbone,
                adapter,
                sequence,
                buffers=(slots.k_buffers, slots.v_buffers),
                slots=leased,
                objective=Likelihood(learned),
                loss_tokens=16,
                dropout_key=0,
                gradients=layers.__getitem__,
            )
            while (unit := batch.next_unit(window=16, layers=2)) is not None:
                unit.run()
            slots.give(leased)
        total = [gradient for layer in layers for gradient in layer]
        pairs = list(zip(total, wanted, strict=True))
        if step == 0:  # B is zero, so that A has no gradient but rounding
            pairs = [(found, want) for found, want in pairs if want.norm() > 0]
        errors.append(max(((found - want).norm() / want.norm()).item() for found, want in pairs))
        for parameter, gradient in zip(adapter.parameters(), total, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return errors


def find(folder: Path) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from harli_appliance.runtime.arguments import RuntimeOptions
    from harli_appliance.runtime.kv import SglangSlots
    from harli_appliance.runtime.sglang_runtime import SglangRuntime
    from harli_appliance.runtime.weights import shared_model
    from harli_appliance.training.adapter import Adapter
    from harli_appliance.training.backbone import Backbone
    from tests.test_runtime import prompt

    torch.set_num_threads(1)

    options = RuntimeOptions(
        folder, pool_slots=POOL, max_lora_rank=8, max_adapters=2, chunked_prefill_tokens=32
    )
    runtime = SglangRuntime(options)
    slots = SglangSlots(runtime)
    twin = shared_model(runtime.model, folder)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=twin.config._attn_implementation
    ).eval()
    storages = {p.untyped_storage().data_ptr() for p in runtime.model.parameters()}
    ids = torch.tensor([prompt(9, 90), prompt(10, 90)])
    with torch.no_grad():
        difference = (twin(ids).logits - reference(ids).logits).abs().max().item()

    prompts = {f"plain-{n}": prompt(n, n) for n in PROMPTS}
    plain = serve(runtime, {name: (tokens, None) for name, tokens in prompts.items()}, 12)

    backbone = Backbone(twin)
    adapter = Adapter(backbone, rank=4, alpha=8, seed=1)
    errors = train(backbone, adapter, slots)
    adapter.save(folder / "adapter")
    adapter.detach()
    runtime.load_adapter("tuned", runtime.read_adapter("tuned", str(folder / "adapter")))
    asked = {f"tuned-{n}": (tokens, "tuned") for n, tokens in zip(PROMPTS, prompts.values(), strict=True)}
    again = {f"again-{n}": (tokens, None) for n, tokens in zip(PROMPTS, prompts.values(), strict=True)}
    mixed = serve(runtime, {**asked, **again}, 12)
    tuned_answers: list[Answer] = [(asked[name][0], mixed[name]) for name in asked]
    peft = PeftModel.from_pretrained(copy.deepcopy(reference), folder / "adapter").eval()
    counts = slots.counts()
    return {
        "architecture": type(reference).__name__,
        "logits_difference": difference,
        "copied_bytes": sum(
            p.nbytes for p in twin.parameters() if p.untyped_storage().data_ptr() not in storages
        ),
        "wrong": wrong_tokens(reference, [(prompts[name], plain[name]) for name in prompts]),
        "wrong_beside_adapter": wrong_tokens(reference, [(again[name][0], mixed[name]) for name in again]),
        "wrong_tuned": wrong_tokens(peft, tuned_answers),
        "tuned_differs": sum(mixed[a] != mixed[b] for a, b in zip(asked, again, strict=True)),
        "distinct_tokens": len({token for tokens in plain.values() for token in tokens}),
        "gradient_errors": errors,
        "slots_serving": counts.serving,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    import sglang.srt.models.registry  # noqa: F401  imports every model that SGLang has

    import harli_appliance.runtime.sglang_runtime  # noqa: F401

    for folder in map(Path, sys.argv[1:]):
        child = os.fork()
        if child == 0:
            try:
                found = find(folder)
                (folder / "findings.json").write_text(json.dumps(found))
            except BaseException:
                print(f"{folder.name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(0)  # SGLang has threads that nobody asked to stop
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
