"""One finetuning job in memory: its data, adapter, optimizer and where it is.

Knows tensors and files; does not know when its units may run. Every method runs on a lane's thread, one at a
time. A run that is built again from its last checkpoint goes on exactly as if it had not stopped: the examples
of a step and the masks of dropout are functions of seed and step, and nothing else draws random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harli_appliance.api.ports import Job
from harli_appliance.errors import JobFailed
from harli_appliance.training import checkpoints
from harli_appliance.training.activations import Buffers, footprint
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.adapter_state import AdapterState
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.dropout import sequence_key
from harli_appliance.training.fit import fit, fitting_tokens
from harli_appliance.training.kept_outputs import kept_slots
from harli_appliance.training.learning_rate import learning_rate
from harli_appliance.training.objectives import Likelihood, Objective, Preference
from harli_appliance.training.packing import (
    Encoded,
    examples_of_step,
    pack,
    size_of,
    steps_in_epoch,
)
from harli_appliance.training.units import MicroBatch
from harli_appliance.training.validation import Validation

DIVERGED = 3.0
"""A loss so many times that of guessing evenly among all tokens, ln(vocabulary), has exploded."""
BEST = "best"
"""Folder of the checkpoints that did best on the held-out examples, beside the others."""
KEPT_BEST = 2
LEAST_LOSS_TOKENS = 16
WINDOW_PER_LOSS = 8
"""Against a vocabulary of 49,152 a learned token in a loss unit takes about as long as so many tokens of a window
in a backward unit."""


def loss_tokens(window: int) -> int:
    """Learned tokens of a loss unit where windows are of `window` tokens."""
    return max(LEAST_LOSS_TOKENS, window // WINDOW_PER_LOSS)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run needs besides the job; see `TrainingSettings`."""

    window_tokens: int
    sequence_tokens: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    checkpoints: Path
    fuses: Callable[[], bool] = lambda: False
    """Whether steps may be fused with forward windows of the next micro-batch."""


def adapter_for(job: Job, backbone: Backbone) -> Adapter:
    """A new adapter as the job asks for it, put on the backbone."""
    return Adapter(
        backbone,
        rank=job.lora_rank,
        alpha=job.lora_alpha,
        seed=job.seed,
        method=job.peft_method,
        targets=job.target_modules,
        rslora=job.use_rslora,
        dropout=job.lora_dropout,
    )


class JobRun:
    """The state of a running job.

    Args:
        examples: what is learned from.
        buffers: the K and V buffers whose leased rows hold micro-batches.
        leasable: slots that can be leased at most; a job that needs more is refused.
        kept_back: examples on which the loss is computed at intervals, without learning from them.

    Raises:
        JobFailed: the adapter's state and a micro-batch would not fit the pool.
    """

    def __init__(
        self,
        job: Job,
        examples: Sequence[Encoded],
        backbone: Backbone,
        buffers: Buffers,
        options: RunOptions,
        leasable: int,
        kept_back: Sequence[Encoded] = (),
    ) -> None:
        self.job = job
        self.window_tokens = options.window_tokens
        self._backbone = backbone
        self._buffers = buffers
        self._options = options
        self._examples = examples
        # Of preferences, the base model's log-probabilities of both answers; computed when first needed.
        pairs = len(self._examples) + len(kept_back) if job.method == "dpo" else 0
        self._references = torch.full((pairs, 2), torch.nan, dtype=torch.float64)
        self.total_steps = job.n_epochs * steps_in_epoch(len(self._examples), job.batch_size)
        self.step = self._kept_step = 0
        self._drafts: dict[Path, Callable[[], object]] = {}
        self.trained_tokens = 0
        self.loss: float | None = None
        self.adapter = adapter_for(job, backbone)
        layers = [self.adapter.parameters(layer) for layer in range(len(backbone.layers))]
        # A group for each layer: on a GPU the step needs room for a copy of a group's parameters.
        groups = [{"params": layer} for layer in layers]
        self._optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, weight_decay=0.0)
        self.state = AdapterState(layers, self._optimizer, [*buffers[0], *buffers[1]])
        try:
            self._refuse_oversize(leasable, kept_back)
            self.validation = Validation(
                kept_back,
                self._sequence_tokens,
                every=job.eval_steps,
                patience=job.early_stopping_patience,
            )
            self._resume()
        except BaseException:
            self.adapter.detach()
            raise
        self._plan_step()

    def _refuse_oversize(self, leasable: int, kept_back: Sequence[Encoded]) -> None:
        """Also sets how long packed sequences may be: as asked, or as long as the pool allows."""
        self._leasable = leasable - self.state.slots
        state = self.state.slots
        need = fit(self._backbone, state, max(map(size_of, [*self._examples, *kept_back])), leasable)
        if not need.fits:
            raise JobFailed(need.refusal(), code="does_not_fit")
        most = fitting_tokens(self._backbone, self._leasable)
        self._sequence_tokens = min(self._options.sequence_tokens, most)

    # -- micro-batches -----------------------------------------------------------------------------------

    def _plan_step(self) -> None:
        """Choose and pack the examples of what comes next: an evaluation or an optimizer step."""
        self._step_loss = 0.0
        self._step_tokens = 0
        self.evaluating = self.validation.due(self.step, self.total_steps)
        if self.evaluating:
            held_out = len(self.validation.examples)
            self._chosen: Sequence[int] = range(len(self._examples), len(self._examples) + held_out)
            self._packs = self.validation.packs
            self._objective = self._objective_of(self.validation.examples)
            return
        if self.done:
            self._packs = []
            return
        self._chosen = examples_of_step(len(self._examples), self.job.batch_size, self.job.seed, self.step)
        chosen = [self._examples[index] for index in self._chosen]
        self._packs = pack(chosen, self._sequence_tokens)
        self._objective = self._objective_of(chosen)

    @property
    def done(self) -> bool:
        """Whether nothing is left to compute: all steps are made, or validation gave up hope."""
        ended = self.step >= self.total_steps or self.validation.hopeless
        return ended and not self.evaluating

    def _objective_of(self, examples: Sequence[Encoded]) -> Objective:
        if self.job.method == "dpo":
            return Preference(self.job.beta, pairs=len(examples))
        return Likelihood(max(1, sum(example.learned_tokens for example in examples)))

    def _pairs_of(self, index: int) -> list[int]:
        """The examples in packed sequence `index`, by their numbers in the file; held-out ones come after them."""
        return [self._chosen[item] for item in self._packs[index].items]

    def micro_batches(self) -> int:
        """Packed sequences of the current step or evaluation."""
        return len(self._packs)

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return len(self._backbone.layers)

    def ends_step(self, index: int) -> bool:
        """Whether the optimizer's step follows micro-batch `index`."""
        return index + 1 == len(self._packs)

    def slots_of(self, index: int) -> int:
        """Slots that micro-batch `index` needs when it begins now: more where steps may be fused with it, if there
        are so many."""
        size = partial(footprint, self._backbone, len(self._packs[index]))
        more = size(keeps_kv=True).slots
        return more if self._options.fuses() and more <= self._leasable else size(keeps_kv=False).slots

    def spared_slots_of(self, index: int) -> int:
        """Slots for each layer in which micro-batch `index` would keep what spares computing that layer again; 0
        where there is nothing to keep."""
        if self.evaluating:
            return 0
        return kept_slots(self._backbone, self.adapter.projections, len(self._packs[index]))

    def begin(self, index: int, slots: Tensor) -> MicroBatch:
        """Start a micro-batch; its backward units add to the gradients of the step.

        Args:
            slots: as many as `slots_of` said when they were leased.
        """
        known = self._references[self._pairs_of(index)] if self.job.method == "dpo" else None
        more = footprint(self._backbone, len(self._packs[index]), keeps_kv=True).slots
        return MicroBatch(
            self._backbone,
            self.adapter,
            self._packs[index],
            buffers=self._buffers,
            slots=slots,
            objective=self._objective,
            loss_tokens=loss_tokens(self.window_tokens),
            dropout_key=None if self.evaluating else sequence_key(self.job.seed, self.step, index),
            gradients=None if self.evaluating else self.state.gradients,
            reference=None if known is None or known.isnan().any() else known.flatten(),
            keeps_kv=len(slots) == more,
        )

    def finish(self, index: int, batch: MicroBatch) -> None:
        """Count a complete micro-batch."""
        self._step_loss += batch.loss
        if batch.reference is not None:
            self._references[self._pairs_of(index)] = batch.reference.view(-1, 2)
        if not self.evaluating:
            self._step_tokens += batch.tokens

    def drop(self, index: int, batch: MicroBatch) -> int:
        """Forget an incomplete micro-batch; the index of the one to begin next. It is the step's first when the
        gradients of this one were added to the step's already."""
        if not batch.has_added:
            return index
        self.state.begin_step()
        self._step_loss = 0.0
        self._step_tokens = 0
        return 0

    # -- steps ---------------------------------------------------------------------------------------------

    def end_round(self) -> None:
        """All micro-batches are complete: make the optimizer's step, or judge the evaluation.

        Raises:
            JobFailed: see `optimizer_step`.
        """
        if self.evaluating:
            self._end_evaluation()
        else:
            self.optimizer_step()

    def _end_evaluation(self) -> None:
        self.validation.standing = standing = self.validation.standing.after(self.step, self._step_loss)
        if standing.best_step == self.step:
            self._take_down(self._home / BEST, KEPT_BEST)
        self._plan_step()

    def optimizer_step(self) -> None:
        """Apply the gradients of the step.

        Raises:
            JobFailed: the loss has exploded, or it or the gradients are not finite; the weights are left as they
                were. A checkpoint of these very weights is removed, the one before stays.
        """
        job = self.job
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), job.max_grad_norm or math.inf)
        too_large = DIVERGED * math.log(self._backbone.vocabulary)
        if not (self._step_loss <= too_large and torch.isfinite(norm)):  # NaN is not below anything
            checkpoints.remove(self._home, self.step)
            raise JobFailed(
                f"the loss of step {self.step + 1} has diverged: it is {self._step_loss:.4g}, the gradients' norm "
                f"{norm:.4g}; try a lower learning rate than {job.learning_rate:g}, or a longer warm-up",
                code="loss_diverged",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(
                job.lr_scheduler_type, job.learning_rate, self.step, self.total_steps, job.warmup_ratio
            )
        self._optimizer.step()
        self.state.begin_step()
        self.loss = self._step_loss
        self.trained_tokens += self._step_tokens
        self.step += 1
        self._plan_step()

    # -- checkpoints -----------------------------------------------------------------------------------------

    @property
    def _home(self) -> Path:
        return self._options.checkpoints / self.job.id

    @property
    def checkpoint_due(self) -> bool:
        """An evaluation comes first, so that the checkpoint has its result."""
        due = self.step % self._options.checkpoint_every_steps == 0 and self.step < self.total_steps
        return due and not self.evaluating

    @property
    def has_unkept_steps(self) -> bool:
        """Whether nothing that was taken down has the last optimizer step."""
        return self.step > self._kept_step

    def checkpoint(self) -> None:
        """Take down the job as it was after the last optimizer step, for `write`; at any time between two of
        them."""
        self._take_down(self._home, self._options.keep_checkpoints)
        self._kept_step = self.step

    def _take_down(self, home: Path, keep: int) -> None:
        progress = checkpoints.Progress(self.step, self.trained_tokens, self.loss, self.validation.standing)
        tensors = {**self.state.tensors(), "references": self._references}
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        # What the disk refused gives way: to newer ones of its kind, and checkpoints to a best one that they lack.
        if home == self._home:
            self._drafts.pop(home, None)
        else:
            self._drafts.clear()
        self._drafts[home] = partial(checkpoints.save, home, progress, copies, keep)

    def write(self) -> None:
        """Keep what was taken down, if anything. It may take seconds, in which the state may move.

        Raises:
            ApplianceUnavailable: the disk refuses it; the next call tries again.
        """
        for home in list(self._drafts):
            self._drafts[home]()
            del self._drafts[home]

    def _resume(self) -> None:
        found = checkpoints.load_newest(self._home)
        if found is None:
            return
        progress, tensors = found
        self.state.load(tensors)
        self._references = tensors["references"]
        self.step, self.trained_tokens, self.loss = progress.step, progress.trained_tokens, progress.loss
        self._kept_step = self.step
        self.validation.standing = progress.standing

    def take_best(self) -> None:
        """Take over the weights that did best on the held-out examples, if there are any.

        Raises:
            JobFailed: their checkpoint is gone or damaged.
        """
        best = self.validation.standing.best_step
        if not best or best == self.step:
            return
        tensors = checkpoints.load_step(self._home / BEST, best)
        if tensors is None:
            raise JobFailed(
                f"the checkpoint of step {best}, the best one, is gone or damaged; run the job again",
                code="checkpoint_lost",
            )
        self.state.load(tensors)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, whole or not at all; the best one where held-out examples told.

        Raises:
            JobFailed: see `take_best`.
            ApplianceUnavailable: the disk refuses it.
        """
        self.take_best()
        checkpoints.write_atomically(folder, self.adapter.save)

    def discard_checkpoints(self) -> None:
        checkpoints.discard(self._home)

    def close(self) -> None:
        """Take the adapter off the backbone."""
        self.adapter.detach()
