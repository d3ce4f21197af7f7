"""A job that stops and goes on is, bit for bit, the job that did not stop."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.errors import JobFailed
from harli_appliance.runtime.text import TextCodec
from harli_appliance.training import job_run
from harli_appliance.training.activations import footprint
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.job_run import JobRun, RunOptions
from harli_appliance.training.packing import examples_of_step
from harli_appliance.training.units import MicroBatch
from tests.encoding import encoded
from tests.test_coserving import a_job, lesson  # noqa: F401  a fixture

STEPS = 6
SLOTS = 1600


class Bench:
    """Builds runs of one job on a private copy of the tiny model."""

    def __init__(self, reference: Any, folder: Path, data: Path, home: Path) -> None:
        self.backbone = Backbone(copy.deepcopy(reference).requires_grad_(False))
        self._codec = TextCodec(folder)
        self._data = data
        self._home = home
        layers = range(len(self.backbone.layers))
        make = lambda: [torch.zeros(SLOTS, self.backbone.kv_width) for _ in layers]  # noqa: E731
        self.buffers = (make(), make())

    def run(
        self,
        home: str,
        leasable: int = 1100,
        keep: int = 3,
        dropout: float = 0.0,
        data: Path | None = None,
        held_out: Path | None = None,
        fuses: Callable[[], bool] = lambda: False,
        **changes: Any,
    ) -> JobRun:
        options = RunOptions(16, 64, 1, keep, self._home / home, fuses)
        job = replace(a_job(epochs=2, dropout=dropout), **changes)
        examples = encoded(data or self._data, self._codec)
        kept_back = encoded(held_out, self._codec) if held_out is not None else []
        return JobRun(job, examples, self.backbone, self.buffers, options, leasable, kept_back)

    def copy_checkpoint(self, source: str, target: str, step: int) -> None:
        (folder,) = (self._home / source).glob(f"*/step-{step:06d}")
        shutil.copytree(folder, self._home / target / folder.parent.name / folder.name)

    def micro_batch(self, run: JobRun, index: int, kinds: list[str] | None = None) -> None:
        batch = run.begin(index, torch.arange(run.slots_of(index)))
        while (unit := batch.next_unit(run.window_tokens, layers=1)) is not None:
            unit.run()
            if kinds is not None:
                kinds.append(unit.kind)
        run.finish(index, batch)

    def step(self, run: JobRun, kinds: list[str] | None = None, begin: int = 0) -> float:
        for index in range(begin, run.micro_batches()):
            self.micro_batch(run, index, kinds)
        run.end_round()
        run.write()
        assert run.loss is not None
        return run.loss


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """Twelve pairs, of which the shorter answer is preferred."""
    path = tmp_path / "preferences.jsonl"
    lines = []
    for number in range(12):
        sides = [[{"role": "assistant", "content": "otters " * (number % 3 + length)}] for length in (1, 4)]
        prompt = {"messages": [{"role": "user", "content": f"who made you {number}"}]}
        lines.append({"input": prompt, "preferred_output": sides[0], "non_preferred_output": sides[1]})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def weights(run: JobRun) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.adapter.state().items()}


@pytest.fixture
def bench(reference: Any, tiny_model: Path, lesson: Path, tmp_path: Path) -> Bench:
    return Bench(reference, tiny_model, lesson, tmp_path)


def test_twenty_steps_stopped_after_any_of_them_are_the_same_twenty_steps(bench: Bench) -> None:
    options = {"n_epochs": 5, "batch_size": 3, "lora_dropout": 0.3, "lr_scheduler_type": "linear"}
    straight = bench.run("straight", keep=100, **options)
    assert straight.total_steps == 20
    losses = []
    for _ in range(20):
        losses.append(bench.step(straight))
        straight.checkpoint()
        straight.write()
    wanted, tokens = weights(straight), straight.trained_tokens
    straight.close()
    for stop in range(1, 20):
        bench.copy_checkpoint("straight", f"stopped-{stop}", stop)
        resumed = bench.run(f"stopped-{stop}", **options)
        assert resumed.step == stop
        assert [bench.step(resumed) for _ in range(20 - stop)] == losses[stop:]
        for name, value in weights(resumed).items():
            assert torch.equal(value, wanted[name]), name
        assert resumed.trained_tokens == tokens
        resumed.close()


@pytest.mark.parametrize(
    "options", [{}, {"peft_method": "dora"}, {"peft_method": "ia3"}, {"method": "dpo", "beta": 0.3}], ids=str
)
def test_every_method_resumes_bit_for_bit(bench: Bench, preferences: Path, options: dict[str, Any]) -> None:
    data = preferences if options.get("method") == "dpo" else None
    straight = bench.run("straight", keep=100, data=data, **options)
    losses = []
    for _ in range(STEPS):
        losses.append(bench.step(straight))
        straight.checkpoint()
        straight.write()
    assert losses[-1] < losses[0]
    wanted = weights(straight)
    straight.close()
    for stop in (1, 4):
        bench.copy_checkpoint("straight", f"stopped-{stop}", stop)
        resumed = bench.run(f"stopped-{stop}", data=data, **options)
        assert [bench.step(resumed) for _ in range(STEPS - stop)] == losses[stop:]
        for name, value in weights(resumed).items():
            assert torch.equal(value, wanted[name]), name
        resumed.close()


def test_the_base_models_view_of_a_pair_is_computed_once(bench: Bench, preferences: Path) -> None:
    run = bench.run("pairs", data=preferences, method="dpo")
    kinds: list[list[str]] = []
    for _ in range(STEPS):
        seen: list[str] = []
        bench.step(run, seen)
        kinds.append(seen)
    run.close()
    loss_units = [seen.count("forward") for seen in kinds]
    half = STEPS // 2  # an epoch: from then on every pair has been seen
    assert sum(loss_units[:half]) == 2 * sum(loss_units[half:])


def test_pausing_in_the_middle_of_a_step_keeps_the_steps_before_it(bench: Bench) -> None:
    straight = bench.run("straight")
    wanted = [bench.step(straight) for _ in range(STEPS)]
    tokens = straight.trained_tokens
    straight.close()
    first = bench.run("paused")
    found = [bench.step(first), bench.step(first)]
    assert first.has_unkept_steps
    bench.micro_batch(first, 0)  # its gradients are lost with the pause, and must not be counted either
    first.checkpoint()
    first.write()
    assert not first.has_unkept_steps
    first.close()
    second = bench.run("paused")
    assert not second.has_unkept_steps
    assert second.step == 2
    found += [bench.step(second) for _ in range(STEPS - 2)]
    assert found == wanted
    assert second.trained_tokens == tokens
    second.close()


@pytest.mark.parametrize(("last", "again_from"), [("forward", 1), ("loss", 1), ("backward", 0)])
def test_a_dropped_micro_batch_leaves_no_trace(bench: Bench, last: str, again_from: int) -> None:
    """Dropped before it adds to the step's gradients it begins again alone, after that the step does."""
    calm = bench.run("calm", dropout=0.3)
    assert calm.micro_batches() > 1
    wanted = [bench.step(calm) for _ in range(3)]
    calm.close()
    disturbed = bench.run("disturbed", dropout=0.3)
    found = []
    for _ in range(3):
        bench.micro_batch(disturbed, 0)
        batch = disturbed.begin(1, torch.arange(disturbed.slots_of(1)))
        while (unit := batch.next_unit(disturbed.window_tokens, layers=1)) is not None:
            before = unit.kind == "backward" and last != "backward"
            if before or (unit.kind == "loss" and last == "forward"):
                break
            unit.run()
            if unit.kind == last == "backward":
                break
        begin = disturbed.drop(1, batch)
        assert begin == again_from
        found.append(bench.step(disturbed, begin=begin))
    disturbed.close()
    assert found == wanted


@pytest.mark.parametrize("seed", range(3))
def test_a_job_that_is_preempted_at_random_is_the_undisturbed_one(bench: Bench, seed: int) -> None:
    """Between any two units micro-batches are dropped or copied away and back, and the adapter is parked or
    placed; what training had let go of is overwritten."""
    calm = bench.run("calm", dropout=0.3)
    losses = [bench.step(calm) for _ in range(STEPS)]
    wanted = weights(calm)
    calm.close()
    found, happened = [], Counter[str]()
    disturbed = bench.run("disturbed", dropout=0.3)
    storm = Storm(bench, disturbed, random.Random(seed), happened)
    for _ in range(STEPS):
        index = 0
        while index < disturbed.micro_batches():
            index = storm.micro_batch(index)
        storm.maybe_move()
        disturbed.optimizer_step()
        assert disturbed.loss is not None
        found.append(disturbed.loss)
    assert set(happened) == {
        "parked",
        "placed",
        "dropped",
        "spared slots taken back",
        "swapped forward",
        "swapped loss",
        "swapped backward",
    }
    assert found == losses
    for name, value in weights(disturbed).items():
        assert torch.equal(value, wanted[name]), name
    disturbed.close()


class Storm:
    """Takes slots away from a run at random, as serving does."""

    def __init__(self, bench: Bench, run: JobRun, rng: random.Random, happened: Counter[str]) -> None:
        self._run, self._rng, self._happened = run, rng, happened
        self._state = run.state.slots
        self._buffers = [*bench.buffers[0], *bench.buffers[1]]

    def _elsewhere(self, count: int) -> Tensor:
        """Any slots that are not the adapter's; what no one holds is rubbish."""
        slots = torch.tensor(self._rng.sample(range(self._state + 8, SLOTS), count))
        for buffer in self._buffers:
            buffer[self._state + 8 :] = float("nan")
        return slots

    def maybe_move(self) -> None:
        if self._rng.random() < 0.9:
            return
        if self._run.state.placed:
            self._run.state.park()
            for buffer in self._buffers:
                buffer[: self._state + 8] = float("nan")
            self._happened["parked"] += 1
        else:
            first = self._rng.randrange(8)
            self._run.state.place(torch.arange(first, first + self._state))
            self._happened["placed"] += 1

    def micro_batch(self, index: int) -> int:
        """The index of the one to begin next."""
        count = self._run.slots_of(index)
        spared, layers = self._run.spared_slots_of(index), self._rng.randrange(self._run.layers + 1)
        slots = self._elsewhere(count + layers * spared)
        batch = self._run.begin(index, slots[:count])
        batch.keep_outputs([slots[count + at * spared :][:spared] for at in range(layers)])
        lent = set(range(layers))
        while (unit := batch.next_unit(self._run.window_tokens, layers=1)) is not None:
            unit.run()
            self.maybe_move()
            if lent and self._rng.random() < 0.05:
                batch.drop_outputs(lent.pop())
                self._happened["spared slots taken back"] += 1
            chance = self._rng.random()
            if chance < (0.5 if unit.kind == "loss" else 0.06):
                batch.swap_out()
                batch.swap_in(self._elsewhere(count))
                self._happened[f"swapped {unit.kind}"] += 1
            elif chance > 0.98:
                self._happened["dropped"] += 1
                return self._run.drop(index, batch)
        self._run.finish(index, batch)
        return index + 1


def test_every_micro_batch_draws_its_own_masks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []

    def noting(*args: Any, dropout_key: int, **kwargs: Any) -> MicroBatch:
        keys.append(dropout_key)
        return MicroBatch(*args, dropout_key=dropout_key, **kwargs)

    monkeypatch.setattr(job_run, "MicroBatch", noting)
    run = bench.run("noted", dropout=0.3)
    batches = 0
    for _ in range(3):
        batches += run.micro_batches()
        bench.step(run)
    run.close()
    assert len(keys) == batches > 3
    assert len(set(keys)) == batches


@pytest.mark.parametrize(("value", "limit"), [(math.nan, 3.0), (0.01, 0.1)])
def test_a_loss_that_diverges_fails_the_job_and_leaves_its_last_good_checkpoint(
    bench: Bench, value: float, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.run("diverged")
    bench.step(run)
    run.checkpoint()
    run.write()
    good = weights(run)
    bench.step(run)
    with torch.no_grad():
        for parameter in run.adapter.parameters():
            parameter.fill_(value)
    run.checkpoint()  # nothing shows yet that these weights are bad
    run.write()
    monkeypatch.setattr(job_run, "DIVERGED", limit)
    with pytest.raises(JobFailed, match="lower learning rate") as failure:
        bench.step(run)
    assert failure.value.code == "loss_diverged"
    run.close()
    again = bench.run("diverged")
    assert again.step == 1
    assert all(torch.equal(value, good[name]) for name, value in weights(again).items())
    again.close()


@pytest.mark.parametrize("most", [0.0, 1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm_of_the_job(
    bench: Bench, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    def noting(self: torch.optim.AdamW) -> None:
        learned = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(learned).item())

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    run = bench.run("clipped", max_grad_norm=most)
    bench.step(run)
    run.close()
    if most == 1e-3:
        assert norms == pytest.approx([1e-3], rel=1e-3)
    else:
        assert norms[0] > 2e-3


def test_a_job_that_cannot_fit_is_refused_with_the_numbers(bench: Bench) -> None:
    fitting = bench.run("fitting")
    state = fitting.state.slots
    fitting.close()
    with pytest.raises(
        JobFailed, match=rf"needs \d+ slots of the pool \({state} for its adapter.* at most {state}"
    ):
        bench.run("small", leasable=state)
    assert not any("lora" in name for name, _ in bench.backbone.model.named_parameters())


def test_sequences_are_packed_only_as_far_as_the_pool_allows(bench: Bench) -> None:
    roomy = bench.run("roomy")
    few, state = roomy.micro_batches(), roomy.state.slots
    roomy.close()
    tight = bench.run("tight", leasable=state + 80)
    assert tight.micro_batches() > few
    for _ in range(tight.total_steps):
        assert all(tight.slots_of(index) <= 80 for index in range(tight.micro_batches()))
        bench.step(tight)
    tight.close()


def test_kv_of_all_layers_are_kept_while_steps_may_be_fused_and_there_is_room(bench: Bench) -> None:
    fused = True
    roomy = bench.run("fused", fuses=lambda: fused)
    more, few = roomy.slots_of(0), roomy.state.slots
    kept = roomy.begin(0, torch.arange(more))
    assert kept.fusible_tokens == kept.tokens
    assert more == footprint(bench.backbone, kept.tokens, keeps_kv=True).slots
    fused = False
    less = roomy.slots_of(0)
    assert less < more == kept.slots, "a micro-batch that has begun keeps its size"
    assert roomy.begin(0, torch.arange(less)).fusible_tokens == 0
    roomy.close()
    tight = bench.run("tight", leasable=few + more - 1, fuses=lambda: True)
    assert tight.slots_of(0) == less
    tight.close()


def test_each_epoch_sees_every_example_once_in_a_new_order() -> None:
    epochs = []
    for epoch in range(3):
        seen: list[int] = []
        for step in range(3):
            seen += examples_of_step(10, 4, seed=7, step=3 * epoch + step)
        assert sorted(seen) == list(range(10))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert examples_of_step(10, 4, seed=7, step=0) != examples_of_step(10, 4, seed=8, step=0)
