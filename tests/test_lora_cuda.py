"""On a GPU, batches without adapters run none of their kernels; SGLang's own classes, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import Serving

pytestmark = pytest.mark.filterwarnings("ignore")  # importing SGLang warns of its own affairs


@pytest.fixture
def lora(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's modules, as they are on a GPU; as before after the test. `serving` makes them importable."""
    from sglang.srt.lora.backend.triton_backend import TritonLoRABackend
    from sglang.srt.lora.layers import BaseLayerWithLoRA
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.model_executor.runner_utils import _set_capture_lora_variant

    from harli_appliance.runtime.lora_cuda import leave_out_unused

    monkeypatch.setattr(TritonLoRABackend, "skip_inactive_lora_batches", False)
    monkeypatch.setattr(DecodeCudaGraphRunner, "__init__", DecodeCudaGraphRunner.__init__)
    leave_out_unused()
    yield SimpleNamespace(
        backend=TritonLoRABackend,
        layer=BaseLayerWithLoRA,
        manager=LoRAManager,
        runner=DecodeCudaGraphRunner,
        capturing=_set_capture_lora_variant,
    )
    _set_capture_lora_variant(None)


class Prepared(Exception):
    """The batch's adapters are looked up."""


@pytest.mark.parametrize(
    ("variant", "adapters", "prepared"),
    [
        ("lora", [None, None], True),
        ("nolora", [None, None], False),
        (None, [None, None], False),
        (None, [None, "otter"], True),
    ],
)
def test_adapters_are_looked_up_for_graphs_with_them_and_for_batches_with_them(
    lora: Any, variant: str | None, adapters: list[str | None], prepared: bool
) -> None:
    def prepare(batch: Any) -> bool:
        raise Prepared

    lora.capturing(variant)
    backend = lora.backend.__new__(lora.backend)
    backend.batch_info = SimpleNamespace(has_active_lora=True)  # of the batch before
    manager = SimpleNamespace(
        lora_backend=backend, reset_lora_batch=backend.reset_batch_state, _use_cuda_graph_batch=prepare
    )
    with pytest.raises(Prepared) if prepared else contextlib.nullcontext():
        lora.manager.prepare_lora_batch(manager, SimpleNamespace(lora_ids=adapters))
    assert (backend.batch_info is None) != prepared


@pytest.mark.parametrize(
    ("variant", "has_active", "active"), [("lora", False, True), ("nolora", False, False), (None, True, True)]
)
def test_layers_add_adapters_where_their_graph_or_batch_has_them(
    lora: Any, monkeypatch: pytest.MonkeyPatch, variant: str | None, has_active: bool, active: bool
) -> None:
    lora.capturing(variant)
    backend = lora.backend.__new__(lora.backend)
    monkeypatch.setattr(
        lora.backend, "get_batch_info", lambda self: SimpleNamespace(has_active_lora=has_active)
    )
    layer = SimpleNamespace(lora_backend=backend, set_lora=True)
    assert lora.layer.lora_active.fget(layer) == active


def test_the_graph_runner_captures_both_and_replays_what_a_batch_needs(
    lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora.runner.__mro__[1], "__init__", lambda self, model_runner: None)
    runner = lora.runner.__new__(lora.runner)
    with contextlib.suppress(Exception):  # what follows needs a model and a GPU
        runner.__init__(SimpleNamespace())
    for adapters, variant in (([None, "otter"], "lora"), ([None, None], "nolora"), (None, "nolora")):
        assert runner._resolve_lora_variant(SimpleNamespace(lora_ids=adapters)) == variant
