"""What SGLang is started with on each device."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from harli_appliance.runtime.arguments import RuntimeOptions, graph_batches, server_arguments


def test_with_partitions_graphs_are_few_and_of_decode_steps_only() -> None:
    options = RuntimeOptions(Path("m"), device="cuda", max_running_requests=40, partitions=True)
    assert server_arguments(options)["disable_prefill_cuda_graph"]
    assert server_arguments(options)["cuda_graph_bs_decode"] == [1, 2, 4, 8, 12, 16, 24, 32, 40]
    whole = server_arguments(replace(options, partitions=False))
    none = server_arguments(replace(options, graphs=False))
    assert (whole["disable_cuda_graph"], none["disable_cuda_graph"]) == (False, True)
    for arguments in (whole, none):
        assert not {"disable_prefill_cuda_graph", "cuda_graph_bs_decode"} & arguments.keys()


@pytest.mark.parametrize("most", [1, 3, 256, 300, 512, 2000])
def test_every_step_has_a_graph_that_is_not_much_larger(most: int) -> None:
    batches = graph_batches(most)
    assert batches == sorted(set(batches))
    assert (batches[0], batches[-1]) == (1, most)
    assert all(larger <= 2 * smaller and larger - smaller <= 128 for smaller, larger in pairwise(batches))


def test_attention_is_sglangs_choice_on_a_gpu_until_it_is_named() -> None:
    assert server_arguments(RuntimeOptions(Path("m"), device="cuda"))["attention_backend"] is None
    named = server_arguments(RuntimeOptions(Path("m"), device="cuda", attention="triton"))
    assert (named["attention_backend"], named["dtype"], named["lora_backend"]) == (
        "triton",
        "bfloat16",
        "triton",
    )
    cpu = server_arguments(RuntimeOptions(Path("m"), attention="triton"))
    assert (cpu["attention_backend"], cpu["disable_cuda_graph"]) == ("torch_native", True)
