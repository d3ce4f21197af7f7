"""Work units: gradients are those of plain backpropagation, whatever the windows and the packing."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harli_appliance.training.activations import footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.layer_pieces import LayerPieces
from harli_appliance.training.objectives import Likelihood
from harli_appliance.training.packing import EncodedExample, pack
from harli_appliance.training.units import MicroBatch

POOL = 2000
Cut = Callable[[], tuple[int, int]]
"""Draws the window and the layers of each unit."""


def examples(seed: int, lengths: tuple[int, ...]) -> list[EncodedExample]:
    rng = random.Random(seed)
    made = []
    for length in lengths:
        tokens = tuple(rng.randrange(6, 300) for _ in range(length))
        made.append(EncodedExample(tokens, tuple(i > length // 3 and i % 7 != 0 for i in range(length))))
    return made


def a_trained_adapter(reference: Any, **options: Any) -> tuple[Backbone, Adapter]:
    backbone = Backbone(copy.deepcopy(reference).requires_grad_(False))
    adapter = Adapter(backbone, rank=4, alpha=8, seed=1, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapter.peft_model.named_parameters():
        if "lora_B" in name:  # B starts at zero, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        elif "ia3_l" in name or "magnitude" in name:  # both start as the base model
            with torch.no_grad():
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return backbone, adapter


@pytest.fixture(scope="module")
def trained(reference: Any) -> tuple[Backbone, Adapter]:
    return a_trained_adapter(reference)


def buffers(backbone: Backbone) -> tuple[list[Tensor], list[Tensor]]:
    """KV buffers full of rubbish: a unit must never read a row that it did not write."""
    layers = range(len(backbone.layers))
    fill = torch.full((POOL, backbone.kv_width), 1e3)
    return [fill.clone() for _ in layers], [fill.clone() for _ in layers]


def zeros(backbone: Backbone, adapter: Adapter) -> list[list[Tensor]]:
    """Of each layer, for the gradients of its parameters."""
    layers = range(len(backbone.layers))
    return [[torch.zeros_like(parameter) for parameter in adapter.parameters(layer)] for layer in layers]


def by_units(
    backbone: Backbone,
    adapter: Adapter,
    data: list[EncodedExample],
    room: int,
    cut: Cut,
    loss_tokens: int,
    *,
    keeps_kv: bool = False,
) -> tuple[float, list[Tensor]]:
    learned = sum(example.learned_tokens for example in data)
    loss, total = 0.0, zeros(backbone, adapter)
    generator = torch.Generator().manual_seed(room)
    for number, sequence in enumerate(pack(data, room)):
        size = footprint(backbone, len(sequence), keeps_kv=keeps_kv).slots
        slots = torch.randperm(POOL, generator=generator)[:size]
        batch = MicroBatch(
            backbone,
            adapter,
            sequence,
            buffers=buffers(backbone),
            slots=slots,
            objective=Likelihood(learned),
            loss_tokens=loss_tokens,
            dropout_key=number,
            gradients=total.__getitem__,
            keeps_kv=keeps_kv,
        )
        while (unit := batch.next_unit(*cut())) is not None:
            unit.run()
        loss += batch.loss
    return loss, [gradient for layer in total for gradient in layer]


def by_backpropagation(adapter: Adapter, data: list[EncodedExample]) -> tuple[float, list[Tensor]]:
    learned = sum(example.learned_tokens for example in data)
    loss = torch.zeros(())
    for example in data:
        ids = torch.tensor([example.tokens])
        logits = adapter.peft_model(ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        loss = loss + (losses * torch.tensor(example.learn[1:])).sum() / learned
    return loss.item(), list(torch.autograd.grad(loss, adapter.parameters()))


def by_backpropagation_with_dropout(
    adapter: Adapter, data: list[EncodedExample], room: int
) -> tuple[float, list[Tensor]]:
    """Each example by itself, with the masks of the place that it has when packed."""
    learned = sum(example.learned_tokens for example in data)
    loss = torch.zeros(())
    for number, sequence in enumerate(pack(data, room)):
        bounds = [*sorted(set(sequence.starts.tolist())), len(sequence)]
        for start, stop in itertools.pairwise(bounds):
            with adapter.dropping(number, start, stop):
                logits = adapter.peft_model(sequence.tokens[None, start:stop]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, sequence.targets[start:stop], reduction="none")
            loss = loss + (losses * sequence.weights[start:stop]).sum() / learned
    return loss.item(), list(torch.autograd.grad(loss, adapter.parameters()))


def worst_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("keeps_kv", [False, True])
@pytest.mark.parametrize(
    ("window", "room", "loss_tokens"),
    [(128, 512, 16), (16, 200, 5), (7, 64, 1000), (33, 1, 3), (1000, 1000, 1000)],
)
def test_gradients_equal_backpropagation(
    trained: tuple[Backbone, Adapter], window: int, room: int, loss_tokens: int, keeps_kv: bool
) -> None:
    data = examples(window, (50, 33, 90, 7, 20, 140))
    loss, gradients = by_units(*trained, data, room, lambda: (window, 1), loss_tokens, keeps_kv=keeps_kv)
    wanted_loss, wanted = by_backpropagation(trained[1], data)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst_error(gradients, wanted) <= 1e-5


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=4).filter(lambda sizes: max(sizes) >= 4),
    room=st.integers(1, 160),
    loss_tokens=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    keeps_kv=st.booleans(),
)
def test_every_unit_may_have_another_size(
    trained: tuple[Backbone, Adapter],
    lengths: list[int],
    room: int,
    loss_tokens: int,
    seed: int,
    keeps_kv: bool,
) -> None:
    rng = random.Random(seed)
    data = examples(seed, tuple(lengths))
    draw: Cut = lambda: (rng.choice((1, 5, 16, 33, 200)), rng.choice((1, 2, 3, 7)))  # noqa: E731
    loss, gradients = by_units(*trained, data, room, draw, loss_tokens, keeps_kv=keeps_kv)
    wanted_loss, wanted = by_backpropagation(trained[1], data)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst_error(gradients, wanted) <= 1e-5


@pytest.mark.parametrize("room", [1, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"rslora": True},
        {"dropout": 0.3},
        {"rslora": True, "dropout": 0.05},
        {"method": "dora"},
        {"method": "dora", "rslora": True, "dropout": 0.2},
        {"method": "ia3"},
        {"targets": ("q_proj", "down_proj")},
        {"method": "dora", "targets": ("v_proj",)},
        {"method": "ia3", "targets": ("k_proj", "v_proj", "down_proj")},
    ],
    ids=str,
)
def test_gradients_of_every_method_equal_backpropagation(
    reference: Any, options: dict[str, Any], room: int
) -> None:
    backbone, adapter = a_trained_adapter(reference, **options)
    data, rng = examples(4, (50, 33, 7, 90)), random.Random(4)
    draw: Cut = lambda: (rng.choice((5, 16, 33)), rng.choice((1, 2, 3)))  # noqa: E731
    loss, gradients = by_units(backbone, adapter, data, room, draw, 16)
    wanted_loss, wanted = by_backpropagation_with_dropout(adapter, data, room)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst_error(gradients, wanted) <= 1e-5
    without, _ = by_backpropagation(adapter, data)
    assert (without == pytest.approx(loss, rel=1e-5)) == ("dropout" not in options)
    plain, _ = by_backpropagation(a_trained_adapter(reference)[1], data)
    assert (without == pytest.approx(plain, rel=1e-5)) == (options == {"dropout": 0.3})


def test_values_that_no_gradient_needs_are_left_out_and_change_nothing(
    trained: tuple[Backbone, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, adapter = examples(9, (60, 21)), trained[1]
    loss, gradients = by_units(*trained, data, 100, lambda: (25, 1), 16)
    assert all(len(layer.unneeded) == 3 for layer in adapter.projections)
    all_computed = [replace(layer, unneeded=()) for layer in adapter.projections]
    monkeypatch.setattr(adapter, "projections", all_computed)
    again, wanted = by_units(*trained, data, 100, lambda: (25, 1), 16)
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize(("method", "left"), [("lora", 3), ("dora", 1), ("ia3", 1)])
def test_a_method_that_scales_a_projection_needs_its_value(reference: Any, method: Any, left: int) -> None:
    _, adapter = a_trained_adapter(reference, method=method, targets=("k_proj", "v_proj"))
    assert all(len(layer.unneeded) == left and len(layer.kept) == 7 - left for layer in adapter.projections)


def test_the_comparison_sees_a_small_mistake(trained: tuple[Backbone, Adapter]) -> None:
    """Leave the gradient through earlier windows' keys out: the error must be far above the tolerance."""
    data = examples(3, (120,))
    _, wanted = by_backpropagation(trained[1], data)
    original = LayerPieces._past

    def without_gradient(self: LayerPieces, layer: int, a: int) -> tuple[Tensor, Tensor] | None:
        past = original(self, layer, a)
        return None if past is None else (past[0] * 1.001, past[1])

    LayerPieces._past = without_gradient  # type: ignore[method-assign]
    try:
        _, gradients = by_units(*trained, data, 512, lambda: (32, 1), 16)
    finally:
        LayerPieces._past = original  # type: ignore[method-assign]
    assert worst_error(gradients, wanted) > 1e-4


def test_a_micro_batch_leases_what_its_footprint_says(trained: tuple[Backbone, Adapter]) -> None:
    backbone, adapter = trained
    (sequence,) = pack(examples(1, (40,)), 64)
    with pytest.raises(ValueError, match="slots"):
        MicroBatch(
            backbone,
            adapter,
            sequence,
            buffers=buffers(backbone),
            slots=torch.arange(footprint(backbone, 40).slots - 1),
            objective=Likelihood(1),
            loss_tokens=16,
            dropout_key=0,
            gradients=zeros(backbone, adapter).__getitem__,
        )


@pytest.mark.parametrize("keeps_kv", [False, True])
@pytest.mark.parametrize("layers", [1, 3, 100])
def test_trained_tokens_are_credited_once(
    trained: tuple[Backbone, Adapter], layers: int, keeps_kv: bool
) -> None:
    backbone, adapter = trained
    (sequence,) = pack(examples(1, (40,)), 64)
    slots = torch.arange(footprint(backbone, 40, keeps_kv=keeps_kv).slots)
    batch = MicroBatch(
        backbone,
        adapter,
        sequence,
        buffers=buffers(backbone),
        slots=slots,
        objective=Likelihood(1),
        loss_tokens=16,
        dropout_key=0,
        gradients=zeros(backbone, adapter).__getitem__,
        keeps_kv=keeps_kv,
    )
    assert batch.slots == len(slots)
    credited, kinds, left = 0.0, [], []
    while (unit := batch.next_unit(16, layers)) is not None:
        again = batch.next_unit(16, layers)
        assert again is not None
        assert (again.kind, again.credit) == (unit.kind, unit.credit), "nothing ran in between"
        left.append(batch.units_left(16))
        unit.run()
        credited += unit.credit
        kinds.append(unit.kind)
    assert credited == pytest.approx(40)
    assert kinds == sorted(kinds, key=["forward", "loss", "backward"].index)
    if layers == 1:
        assert [*left, batch.units_left(16)] == list(range(len(kinds), -1, -1))
    pieces = 3 * len(backbone.layers)
    again = 0 if keeps_kv else len(backbone.layers) - 1
    assert kinds.count("forward") == -(-pieces // layers)
    assert kinds.count("backward") == -(-(pieces + again) // layers), (
        "K and V are computed again but the last's"
    )


def test_kv_of_one_layer_are_less_memory_and_the_same_gradients(reference: Any) -> None:
    """Long windows of K and V are computed again in several pieces; dropout draws the same masks."""
    backbone, adapter = a_trained_adapter(reference, dropout=0.2)
    layers, kv = len(backbone.layers), footprint(backbone, 400, keeps_kv=True)
    assert footprint(backbone, 400).slots == pytest.approx(kv.slots - 400 + 400 / layers, abs=2)
    data = examples(6, (150, 90))
    found = [
        by_units(backbone, adapter, data, 250, lambda: (10, 1), 16, keeps_kv=keeps) for keeps in (False, True)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert worst_error(found[0][1], found[1][1]) <= 1e-5


def test_only_windows_that_go_through_all_layers_can_be_fused(trained: tuple[Backbone, Adapter]) -> None:
    backbone, adapter = trained
    (sequence,) = pack(examples(1, (40,)), 64)
    for keeps_kv in (True, False):
        batch = MicroBatch(
            backbone,
            adapter,
            sequence,
            buffers=buffers(backbone),
            slots=torch.arange(footprint(backbone, 40, keeps_kv=keeps_kv).slots),
            objective=Likelihood(1),
            loss_tokens=16,
            dropout_key=0,
            gradients=zeros(backbone, adapter).__getitem__,
            keeps_kv=keeps_kv,
        )
        seen = []
        while (unit := batch.next_unit(16, layers=1)) is not None:
            seen.append(batch.fusible_tokens)
            unit.run()
        wanted = {40, 24, 8} if keeps_kv else set()
        assert {left for left in seen if left} == wanted
