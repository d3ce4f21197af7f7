"""Preferences (DPO): loss and gradients are those of a plain implementation, whatever windows and packing."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.training.activations import footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.cross_entropy import cross_entropy_
from harli_appliance.training.objectives import Likelihood, Objective, Preference
from harli_appliance.training.packing import EncodedExample, EncodedPair, PackedSequence, pack
from harli_appliance.training.units import MicroBatch
from tests.test_units import a_trained_adapter, buffers, examples, worst_error, zeros

BETA = 0.7
LENGTHS = ((30, 22), (9, 41), (50, 17))


def pairs(seed: int) -> list[EncodedPair]:
    """Two answers each to the same beginning."""
    made = []
    for number, (one, other) in enumerate(LENGTHS):
        first, second = examples(seed + number, (one, other))
        shared = first.tokens[:4]
        made.append(EncodedPair(_behind(shared, first), _behind(shared, second)))
    return made


def _behind(prompt: tuple[int, ...], answer: EncodedExample) -> EncodedExample:
    return EncodedExample(prompt + answer.tokens, (False,) * len(prompt) + (True,) * len(answer.tokens))


def a_micro_batch(
    trained: tuple[Backbone, Adapter], sequence: PackedSequence, objective: Objective, **options: Any
) -> MicroBatch:
    backbone = trained[0]
    slots = torch.randperm(2000)[: footprint(backbone, len(sequence)).slots]
    options = {"loss_tokens": 7, "dropout_key": None, "gradients": None, **options}
    dtype = backbone.model.dtype
    k, v = ([buffer.to(dtype) for buffer in part] for part in buffers(backbone))
    return MicroBatch(*trained, sequence, buffers=(k, v), slots=slots, objective=objective, **options)


def run(batch: MicroBatch, seed: int = 0, windows: tuple[int, ...] = (5, 16, 33)) -> list[str]:
    rng, kinds = random.Random(seed), []
    while (unit := batch.next_unit(rng.choice(windows), rng.choice((1, 2, 3)))) is not None:
        unit.run()
        kinds.append(unit.kind)
    return kinds


def log_probability(model: Any, example: EncodedExample) -> Tensor:
    ids = torch.tensor([example.tokens])
    log_p = model(ids).logits[0, :-1].log_softmax(-1)
    taken = log_p.gather(1, ids[0, 1:, None])[:, 0]
    return (taken * torch.tensor(example.learn[1:])).sum()


def plain_dpo(adapter: Adapter, base: Any, data: list[EncodedPair]) -> tuple[Tensor, Tensor]:
    """Equation 7 of the DPO paper as it stands, and the base model's log-probabilities."""
    loss, reference = torch.zeros(()), []
    for pair in data:
        with torch.no_grad():
            reference.append([log_probability(base, part) for part in pair.parts])
        won, lost = (log_probability(adapter.peft_model, part) for part in pair.parts)
        margin = (won - reference[-1][0]) - (lost - reference[-1][1])
        loss = loss - torch.nn.functional.logsigmoid(BETA * margin) / len(data)
    return loss, torch.tensor(reference)


@pytest.mark.parametrize("options", [{}, {"method": "dora"}, {"method": "ia3"}], ids=str)
@pytest.mark.parametrize("room", [1, 90, 500])
def test_preferences_are_learned_as_by_a_plain_implementation(
    reference: Any, room: int, options: dict[str, Any]
) -> None:
    trained = a_trained_adapter(reference, **options)
    data = pairs(3)
    objective = Preference(beta=BETA, pairs=len(data))
    gradients, loss = zeros(*trained), 0.0
    wanted_loss, base = plain_dpo(trained[1], copy.deepcopy(reference), data)
    for sequence in pack(data, room):
        batch = a_micro_batch(trained, sequence, objective, gradients=gradients.__getitem__)
        kinds = run(batch, room)
        assert kinds.count("loss") > 2
        assert batch.reference is not None
        found = batch.reference.view(-1, 2).float()
        torch.testing.assert_close(found, base[list(sequence.items)], rtol=1e-5, atol=1e-4)
        loss += batch.loss
    wanted = torch.autograd.grad(wanted_loss, trained[1].parameters())
    assert loss == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert worst_error([g for layer in gradients for g in layer], list(wanted)) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"method": "dora"}, {"method": "ia3"}], ids=str)
@pytest.mark.parametrize("objective", [Likelihood(10.0), Preference(beta=BETA, pairs=3)])
def test_in_bfloat16_as_on_a_gpu_gradients_are_the_same_but_for_rounding(
    reference: Any, objective: Objective, options: dict[str, Any]
) -> None:
    (sequence,) = pack(pairs(5), 500)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        trained = a_trained_adapter(copy.deepcopy(reference).to(dtype), **options)
        gradients = zeros(*trained)
        key = 7 if "dropout" in options else None
        run(a_micro_batch(trained, sequence, objective, gradients=gradients.__getitem__, dropout_key=key))
        found.append(torch.cat([g.float().flatten() for layer in gradients for g in layer]))
    wanted, rounded = found
    assert (rounded - wanted).norm() <= 0.2 * wanted.norm()


def test_a_known_reference_is_not_computed_again_and_changes_nothing(reference: Any) -> None:
    trained = a_trained_adapter(reference)
    (sequence,) = pack(pairs(5), 500)
    objective = Preference(beta=BETA, pairs=3)
    results = []
    known: Tensor | None = None
    for _ in range(2):
        gradients = zeros(*trained)
        batch = a_micro_batch(
            trained, sequence, objective, gradients=gradients.__getitem__, reference=known, loss_tokens=400
        )
        left = batch.units_left(16)
        windows = -(-len(sequence) // 16)
        assert (left > 2.5 * len(trained[0].layers) * windows) == (known is None)
        kinds = run(batch, windows=(16,))
        assert kinds.count("loss") == (1 if known is not None else 2)
        known = batch.reference
        results.append((batch.loss, [g for layer in gradients for g in layer]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("objective", [Likelihood(10.0), Preference(beta=BETA, pairs=3)])
def test_evaluating_gives_the_loss_and_no_gradient(reference: Any, objective: Objective) -> None:
    trained = a_trained_adapter(reference, dropout=0.3)
    (sequence,) = pack(pairs(7), 500)
    learning = a_micro_batch(trained, sequence, objective, gradients=zeros(*trained).__getitem__)
    run(learning)
    batch = a_micro_batch(trained, sequence, objective)
    kinds = run(batch)
    assert "backward" not in kinds
    assert batch.loss == pytest.approx(learning.loss, rel=1e-6)
    assert batch.next_unit(16, 1) is None


@pytest.mark.parametrize("margin", [-1e4, 0.0, 1e4])
def test_a_preference_that_is_certain_stays_finite(margin: float) -> None:
    verdict = Preference(beta=1.0, pairs=1).judge(
        torch.tensor([margin, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    )
    assert verdict.loss == pytest.approx(max(0.0, -margin), abs=0.7)
    assert verdict.factors is not None
    assert verdict.factors.isfinite().all()


def test_cross_entropy_and_its_gradient_are_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(9, 50, generator=generator)).requires_grad_()
    targets = torch.randint(0, 50, (9,), generator=generator)
    weights = torch.rand(9, generator=generator)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (wanted,) = torch.autograd.grad((losses * weights).sum(), logits)
    mine = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(mine, targets, weights), losses.detach())
    torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(cross_entropy_(logits.detach().clone(), targets, None), losses.detach())
