"""One finetuning job in memory: its data, adapter, optimizer and where it is.

Knows tensors and files; does not know when its units may run. Every method runs on a lane's thread, one at a
time. A run that is built again from its last checkpoint goes on exactly as if it had not stopped: the examples
of a step and the masks of dropout are functions of seed and step, and nothing else draws random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from harli_appliance.training.dataset import read_examples
from harli_appliance.training.dropout import sequence_key
from harli_appliance.training.fit import fit, fitting_tokens
from harli_appliance.training.learning_rate import learning_rate
from harli_appliance.training.packing import (
    ChatEncoder,
    EncodedExample,
    PackedSequence,
    encode_example,
    examples_of_step,
    pack,
    steps_in_epoch,
)
from harli_appliance.training.units import MicroBatch

DIVERGED = 3.0
"""A loss so many times that of guessing evenly among all tokens, ln(vocabulary), has exploded."""
LOSS_TOKENS = 16
"""Learned tokens of a loss unit: against a vocabulary of 49,152 about as long as a backward unit of 128 tokens."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run needs besides the job; see `TrainingSettings`."""

    window_tokens: int
    sequence_tokens: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    checkpoints: Path


def adapter_for(job: Job, backbone: Backbone) -> Adapter:
    """A new adapter as the job asks for it, put on the backbone."""
    return Adapter(
        backbone,
        rank=job.lora_rank,
        alpha=job.lora_alpha,
        seed=job.seed,
        rslora=job.use_rslora,
        dropout=job.lora_dropout,
    )


class JobRun:
    """The state of a running job.

    Args:
        buffers: the K and V buffers whose leased rows hold micro-batches.
        leasable: slots that can be leased at most; a job that needs more is refused.

    Raises:
        JobFailed: the adapter's state and a micro-batch would not fit the pool.
    """

    def __init__(
        self,
        job: Job,
        data: Path,
        backbone: Backbone,
        encoder: ChatEncoder,
        buffers: Buffers,
        options: RunOptions,
        leasable: int,
    ) -> None:
        self.job = job
        self.window_tokens = options.window_tokens
        self._backbone = backbone
        self._buffers = buffers
        self._options = options
        self._examples = [encode_example(example, encoder) for example in read_examples(data)]
        self.total_steps = job.n_epochs * steps_in_epoch(len(self._examples), job.batch_size)
        self.step = self._kept_step = 0
        self.trained_tokens = 0
        self.loss: float | None = None
        self.adapter = adapter_for(job, backbone)
        self._optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=job.learning_rate, weight_decay=0.0)
        layers = [self.adapter.parameters(layer) for layer in range(len(backbone.layers))]
        self.state = AdapterState(layers, self._optimizer, [*buffers[0], *buffers[1]])
        try:
            self._refuse_oversize(leasable)
            self._resume()
        except BaseException:
            self.adapter.detach()
            raise
        self._plan_step()

    def _refuse_oversize(self, leasable: int) -> None:
        """Also sets how long packed sequences may be: as asked, or as long as the pool allows."""
        state = self.state.slots
        need = fit(self._backbone, state, max(len(example.tokens) for example in self._examples), leasable)
        if not need.fits:
            raise JobFailed(need.refusal(), code="does_not_fit")
        most = fitting_tokens(self._backbone, leasable - state)
        self._sequence_tokens = min(self._options.sequence_tokens, most)

    # -- micro-batches -----------------------------------------------------------------------------------

    def _plan_step(self) -> None:
        """Choose and pack the examples of the current step."""
        if self.step >= self.total_steps:
            self._packs: list[PackedSequence] = []
            return
        chosen: list[EncodedExample] = [
            self._examples[index]
            for index in examples_of_step(len(self._examples), self.job.batch_size, self.job.seed, self.step)
        ]
        self._packs = pack(chosen, self._sequence_tokens)
        self._learned = sum(example.learned_tokens for example in chosen)
        self._step_loss = 0.0
        self._step_tokens = 0

    def micro_batches(self) -> int:
        """Packed sequences of the current step."""
        return len(self._packs)

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return len(self._backbone.layers)

    def ends_step(self, index: int) -> bool:
        """Whether the optimizer's step follows micro-batch `index`."""
        return index + 1 == len(self._packs)

    def slots_of(self, index: int) -> int:
        return footprint(self._backbone, len(self._packs[index])).slots

    def begin(self, index: int, slots: Tensor) -> MicroBatch:
        """Start a micro-batch; what one before it has left unfinished is forgotten."""
        self.state.begin_batch()
        return MicroBatch(
            self._backbone,
            self.adapter,
            self._packs[index],
            buffers=self._buffers,
            slots=slots,
            normaliser=max(1, self._learned),
            loss_tokens=LOSS_TOKENS,
            dropout_key=sequence_key(self.job.seed, self.step, index),
            gradients=self.state.batch_gradients,
        )

    def finish(self, batch: MicroBatch) -> None:
        """Add a complete micro-batch's gradients to the step's; an incomplete one leaves no trace."""
        self._step_loss += batch.loss
        self.state.add_batch()
        self._step_tokens += batch.tokens

    # -- steps ---------------------------------------------------------------------------------------------

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
        return self.step % self._options.checkpoint_every_steps == 0 and self.step < self.total_steps

    @property
    def has_unkept_steps(self) -> bool:
        """Whether no checkpoint has the last optimizer step."""
        return self.step > self._kept_step

    def checkpoint(self) -> None:
        """Keep the job as it was after the last optimizer step, at any time between two of them."""
        progress = checkpoints.Progress(self.step, self.trained_tokens, self.loss)
        checkpoints.save(self._home, progress, self.state.tensors(), self._options.keep_checkpoints)
        self._kept_step = self.step

    def _resume(self) -> None:
        found = checkpoints.load_newest(self._home)
        if found is None:
            return
        progress, tensors = found
        self.state.load(tensors)
        self.step, self.trained_tokens, self.loss = progress.step, progress.trained_tokens, progress.loss
        self._kept_step = self.step

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, whole or not at all."""
        checkpoints.write_atomically(folder, self.adapter.save)

    def discard_checkpoints(self) -> None:
        checkpoints.discard(self._home)

    def close(self) -> None:
        """Take the adapter off the backbone."""
        self.adapter.detach()
