"""Fused kernels: liger-kernel's in Triton's interpreter, torch's variable-length attention as documented."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor

from harli_appliance.training import fused_kernels, packed_attention
from harli_appliance.training.backbone import Backbone, Kernels
from harli_appliance.training.exercise import Exercise
from harli_appliance.training.fused_kernels import fuse
from harli_appliance.training.packed_attention import Bounds, variable_length_attention
from tests.architectures import CONFIGS
from tests.test_units import a_trained_adapter, by_backpropagation, by_units, examples, worst_error


def by_the_manual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """torch's `varlen_attn`, one sequence after the other; the last query of each stands at its last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    outs = []
    pairs = zip(
        cu_seq_q.tolist(), cu_seq_q.tolist()[1:], cu_seq_k.tolist(), cu_seq_k.tolist()[1:], strict=False
    )
    for a, b, c, d in pairs:
        at = torch.arange(d - c - (b - a), d - c)[:, None]
        keys = torch.arange(d - c)[None]
        seen = keys <= at + window_size[1]
        if window_size[0] >= 0:
            seen &= keys >= at - window_size[0]
        q, k, v = (rows.transpose(0, 1)[None] for rows in (query[a:b], key[c:d], value[c:d]))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def manual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "variable_length_attention", lambda: by_the_manual)
    monkeypatch.setattr(fused_kernels, "variable_length_attention", lambda: by_the_manual)


def of(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    return model.requires_grad_(False)


def test_this_torch_has_the_attention_and_its_arguments() -> None:
    found = variable_length_attention()
    assert found is not None
    assert found.keywords == {"enable_gqa": True}  # type: ignore[attr-defined]


def test_torch_2_11_does_not_ask_whether_heads_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    older = lambda query, key, value, *, scale, window_size: None  # noqa: E731
    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert variable_length_attention() is older


def test_a_torch_whose_attention_lacks_arguments_is_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: None)
    assert variable_length_attention() is None
    with capture_logs() as logs:
        assert not fuse(of("llama")).packed_attention
    assert "2.11" in next(log["why"] for log in logs if log.get("kernel") == "attention")


@pytest.mark.parametrize("keeps_kv", [False, True])
@pytest.mark.parametrize(("window", "room"), [(128, 512), (16, 200), (7, 64), (33, 1)])
def test_packed_attention_gives_the_gradients_of_backpropagation(
    reference: Any, manual: None, window: int, room: int, keeps_kv: bool
) -> None:
    plain, adapter = a_trained_adapter(reference)
    packed = Backbone(plain.model, Kernels(packed_attention=True))
    data = examples(2, (70, 9, 33, 50))
    loss, wanted = by_backpropagation(adapter, data)
    found_loss, found = by_units(packed, adapter, data, room, lambda: (window, 2), 16, keeps_kv=keeps_kv)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert worst_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", ["mistral", "gemma-3"])
def test_layers_with_a_window_of_attention_keep_it(name: str, manual: None) -> None:
    config = CONFIGS[name]()
    config.sliding_window = 24
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain, adapter = a_trained_adapter(AutoModelForCausalLM.from_config(config).eval())
    packed = Backbone(plain.model, Kernels(packed_attention=True))
    data = examples(3, (60, 20, 40))
    loss, wanted = by_backpropagation(adapter, data)
    found_loss, found = by_units(packed, adapter, data, 200, lambda: (16, 1), 16)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert worst_error(found, wanted) < 1e-5


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_a_window_of_a_packed_sequence(lengths: list[int], data: st.DataObject) -> None:
    starts = [sum(lengths[:at]) for at, length in enumerate(lengths) for _ in range(length)]
    a = data.draw(st.integers(0, len(starts) - 1))
    b = data.draw(st.integers(a + 1, len(starts)))
    first = data.draw(st.integers(starts[a], a))
    found = Bounds(starts, torch.device("cpu")).window(first, a, b, None)
    owners = [starts[token] for token in range(a, b)]
    of_keys = [starts[token] for token in range(first, b)]
    examples_seen = sorted(set(owners))
    assert found.queries.diff().tolist() == [owners.count(example) for example in examples_seen]
    assert found.keys.diff().tolist() == [of_keys.count(example) for example in examples_seen]
    assert found.most_queries == found.queries.diff().max()
    assert found.most_keys == found.keys.diff().max()


def test_attention_is_taken_where_it_gives_the_same(manual: None) -> None:
    assert fuse(of("gemma-3")).packed_attention
    assert fuse(of("llama")).packed_attention


def test_attention_that_aligns_queries_with_the_first_key_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first_aligned(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *more: Any, **named: Any
    ) -> Tensor:
        return by_the_manual(
            query, key[: len(query)], value[: len(query)], cu_q, cu_q, more[0], more[0], **named
        )

    monkeypatch.setattr(packed_attention, "variable_length_attention", lambda: first_aligned)
    monkeypatch.setattr(fused_kernels, "variable_length_attention", lambda: first_aligned)
    with capture_logs() as logs:
        assert not fuse(of("llama")).packed_attention
    assert "differs by" in next(log["why"] for log in logs if log.get("kernel") == "attention")


def test_a_model_that_caps_its_scores_keeps_its_own_attention(manual: None) -> None:
    model = of("gemma-2")
    model.set_attn_implementation("eager")
    assert not fuse(model).packed_attention


def test_nothing_is_fused_where_nothing_works() -> None:
    """liger-kernel's kernels find no GPU here, and torch has this attention for GPUs only."""
    model = of("llama")
    with capture_logs() as logs:
        assert fuse(model) == Kernels()
    assert [log["kernel"] for log in logs if log["log_level"] == "warning"] == [
        "norms",
        "cross_entropy",
        "attention",
    ]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_without_liger_kernel_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with capture_logs() as logs:
        fuse(of("llama"))
    assert any("liger_kernel" in log["why"] for log in logs if log.get("kernel") == "norms")


def test_calibration_computes_what_units_do(
    reference: Any, manual: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Tensor:
        asked.append(arguments[5])
        return by_the_manual(*arguments, **named)

    monkeypatch.setattr(packed_attention, "variable_length_attention", lambda: counted)
    Exercise(Backbone(copy.deepcopy(reference).requires_grad_(False), Kernels(packed_attention=True)), 24)()
    assert asked == [24]


def test_a_twin_has_the_same_kernels(reference: Any) -> None:
    kernels = Kernels(packed_attention=True, fused=("attention",))
    assert Backbone(copy.deepcopy(reference), kernels).twin().kernels is kernels


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fused_child", *CONFIGS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_liger_kernels_give_the_gradients_of_backpropagation(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["fused"] == ["norms", "cross_entropy"]
    assert found["norms"] == {"qwen3": 17, "gemma-2": 17, "gemma-3": 25}.get(name, 9)
    assert found["loss"] < 1e-5
    assert found["gradients"] < 2e-5


def test_a_norm_of_another_kind_is_not_taken(interpreted: dict[str, Any]) -> None:
    assert interpreted["another_kind"] == {"fused": ["cross_entropy"], "norms": 0}


def test_a_twins_norms_have_the_same_weights(interpreted: dict[str, Any]) -> None:
    assert interpreted["twin"] < 1e-6
