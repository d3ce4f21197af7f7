"""What SGLang is started with on each device."""

from __future__ import annotations

from pathlib import Path

from harli_appliance.runtime.arguments import RuntimeOptions, server_arguments


def test_graphs_only_where_they_stay_in_the_lane() -> None:
    whole = server_arguments(RuntimeOptions(Path("m"), device="cuda"))
    split = server_arguments(RuntimeOptions(Path("m"), device="cuda", graphs=False))
    assert (whole["disable_cuda_graph"], split["disable_cuda_graph"]) == (False, True)


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
