"""Validation: the loss of held-out examples, computed in units, and what a job does with it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harli_appliance.errors import ApplianceUnavailable, JobFailed
from harli_appliance.training import checkpoints
from harli_appliance.training.job_run import BEST
from harli_appliance.training.validation import Standing, Validation
from tests.test_coserving import lesson  # noqa: F401  a fixture
from tests.test_resume import Bench, bench, preferences, weights  # noqa: F401  fixtures


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    turns = [
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "a river of otters"},
    ]
    path.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(3)))
    return path


def to_the_end(made: Bench, run: Any) -> list[tuple[int, float]]:
    """(step, loss) of each evaluation."""
    found = []
    while not run.done:
        evaluating = run.evaluating
        made.step(run)
        if evaluating:
            found.append((run.validation.standing.step, run.validation.standing.loss))
        if run.checkpoint_due:
            run.checkpoint()
            run.write()
    return found


def test_the_best_standing_is_kept_and_staleness_counted() -> None:
    standing = Standing()
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.0), (8, float("nan"))):
        standing = standing.after(step, loss)
    assert (standing.best_step, standing.best_loss, standing.stale, standing.step) == (4, 2.0, 2, 8)


def test_a_loss_that_is_no_number_is_beaten_by_any_that_is() -> None:
    standing = Standing()
    for step, loss in ((10, float("nan")), (20, 1.5), (30, 1.0)):
        standing = standing.after(step, loss)
    assert (standing.best_step, standing.best_loss, standing.stale) == (30, 1.0, 0)


def test_evaluations_come_at_their_interval_and_at_the_end(bench: Bench, held_out: Path) -> None:
    run = bench.run("evaluated", held_out=held_out, eval_steps=4)
    assert [step for step, _ in to_the_end(bench, run)] == [4, 6]
    run.close()


def test_without_held_out_examples_nothing_is_evaluated() -> None:
    assert not Validation([], 64, every=1, patience=1).due(1, 1)


def test_the_loss_is_that_of_a_plain_forward_pass(bench: Bench, held_out: Path) -> None:
    run = bench.run("plain", held_out=held_out, eval_steps=1, dropout=0.3)
    bench.step(run)
    assert run.evaluating
    before = weights(run)
    losses, learned = 0.0, 0
    for example in run.validation.examples:
        with torch.no_grad():
            log_p = run.adapter.peft_model(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
        taken = -log_p.gather(1, torch.tensor(example.tokens)[1:, None])[:, 0]
        losses += (taken * torch.tensor(example.learn[1:])).sum().item()
        learned += example.learned_tokens
    tokens = run.trained_tokens
    kinds: list[str] = []
    bench.step(run, kinds)
    assert run.validation.standing.loss == pytest.approx(losses / learned, rel=1e-5)
    assert "backward" not in kinds
    assert run.trained_tokens == tokens
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    run.close()


def test_evaluating_changes_nothing_that_is_learned(bench: Bench, held_out: Path) -> None:
    alone = bench.run("alone", dropout=0.3)
    to_the_end(bench, alone)
    wanted = weights(alone)
    alone.close()
    run = bench.run("watched", held_out=held_out, eval_steps=1, dropout=0.3)
    to_the_end(bench, run)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(run).items())
    run.close()


def test_a_job_that_gets_worse_ends_early_with_its_best_adapter(
    bench: Bench,
    held_out: Path,
    tmp_path: Path,
) -> None:
    run = bench.run(
        "patient", held_out=held_out, eval_steps=1, early_stopping_patience=2, n_epochs=20, learning_rate=0.05
    )
    kept: dict[int, dict[str, Any]] = {}
    found = []
    while not run.done:
        evaluating = run.evaluating
        bench.step(run)
        if evaluating:
            found.append(run.validation.standing.loss)
            kept[run.step] = weights(run)
    standing = run.validation.standing
    assert run.step < run.total_steps
    assert standing.stale == 2
    assert found.index(min(found)) + 1 == standing.best_step == run.step - 2
    run.save_adapter(tmp_path / "adapter")
    assert all(torch.equal(value, kept[standing.best_step][name]) for name, value in weights(run).items())
    run.close()


def test_a_best_checkpoint_that_is_damaged_is_not_taken(bench: Bench, held_out: Path, tmp_path: Path) -> None:
    run = bench.run("damaged", held_out=held_out, eval_steps=1, early_stopping_patience=1, learning_rate=0.05)
    to_the_end(bench, run)
    best = run.validation.standing.best_step
    assert best < run.step
    (path,) = tmp_path.glob(f"damaged/*/{BEST}/step-{best:06d}/state.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(JobFailed, match="best one, is gone or damaged"):
        run.save_adapter(tmp_path / "adapter")
    run.close()


def test_what_the_disk_refused_is_written_when_there_is_room(
    bench: Bench, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, save = True, checkpoints.save

    def refusing(*what: Any) -> Path:
        if full:
            raise ApplianceUnavailable("the disk is full")
        return save(*what)

    monkeypatch.setattr(checkpoints, "save", refusing)
    run = bench.run("refused", held_out=held_out, eval_steps=1)
    while run.step < 4 or run.evaluating:
        for index in range(run.micro_batches()):
            bench.micro_batch(run, index)
        run.end_round()
        if run.checkpoint_due:
            run.checkpoint()
        with contextlib.suppress(ApplianceUnavailable):
            run.write()
        assert len(run._drafts) <= 2, "they are in memory"
    full = False
    run.write()
    wanted, standing = weights(run), run.validation.standing
    run.close()
    again = bench.run("refused", held_out=held_out, eval_steps=1)
    assert (again.step, again.validation.standing) == (4, standing)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(again).items())
    again.save_adapter(tmp_path / "adapter")
    again.close()


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_a_job_resumes_between_and_before_evaluations(
    bench: Bench,
    held_out: Path,
    preferences: Path,
    method: Any,
) -> None:
    files = {"data": preferences, "held_out": preferences} if method == "dpo" else {"held_out": held_out}
    options: dict[str, Any] = {**files, "method": method, "eval_steps": 2, "n_epochs": 3}
    straight = bench.run("straight", keep=100, **options)
    wanted = to_the_end(bench, straight)
    final, standing = weights(straight), straight.validation.standing
    straight.close()
    for stop in (1, 4):
        bench.copy_checkpoint("straight", f"stopped-{stop}", stop)
        resumed = bench.run(f"stopped-{stop}", **options)
        assert to_the_end(bench, resumed) == [item for item in wanted if item[0] > stop]
        assert resumed.validation.standing == standing
        assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())
        resumed.close()
