"""The loss of a micro-batch, a few learned tokens at a time: the full logits never exist.

A piece leaves the gradient of the final hidden states in their place. An objective that compares examples needs
all log-probabilities first; what it then says of each example is a factor on these gradients. Knows objectives and
rows.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from harli_appliance.training.activations import Activations
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.objectives import Objective
from harli_appliance.training.packing import PackedSequence


class LossPieces:
    """Args: most: learned tokens of a piece; logits of that many tokens exist at a time."""

    def __init__(
        self, backbone: Backbone, sequence: PackedSequence, rows: Activations, objective: Objective, most: int
    ) -> None:
        self._backbone = backbone
        self._sequence = sequence
        self._learned: list[int] = torch.nonzero(sequence.weights)[:, 0].tolist()
        self._rows = rows
        self._objective = objective
        self._most = most
        self._examples = len(set(sequence.starts.tolist()))
        self._log_probabilities = torch.zeros(0)

    def begin(self) -> None:
        self._log_probabilities = torch.zeros(self._examples, dtype=torch.float64)

    def left(self, start: int) -> int:
        """Pieces from token `start` on, at least one."""
        learned = len(self._learned) - bisect_left(self._learned, start)
        return max(1, -(-learned // self._most))

    def end(self, start: int) -> int:
        """Where the piece ends that begins at token `start`."""
        following = bisect_left(self._learned, start) + self._most
        return self._learned[following] if following < len(self._learned) else len(self._sequence)

    def run(self, a: int, b: int, *, learns: bool) -> None:
        """Log-probabilities of tokens [a, b). Where the stage learns, their final hidden states are replaced by
        the gradient of the weighted sum of -log p, times the objective's scale of tokens."""
        final = self._rows.output_gradient(a, b)
        weights = self._sequence.weights[a:b]
        learned = weights != 0
        gradient = torch.zeros_like(final) if learns else None
        if learned.any():
            hidden, weights = final[learned].requires_grad_(learns), weights[learned]
            with torch.set_grad_enabled(learns):
                logits = self._backbone.logits(hidden)
            by_logits = logits.detach().float()
            scale = weights * self._objective.token_scale if learns else None
            targets = self._sequence.targets[a:b][learned]
            losses = weights * self._backbone.kernels.cross_entropy(by_logits, targets, scale)
            if gradient is not None:
                (gradient[learned],) = torch.autograd.grad(logits, hidden, by_logits.to(logits.dtype))
            members = _members(self._sequence.starts)[a:b][learned].cpu()
            self._log_probabilities.index_add_(0, members, -losses.double().cpu())
        if gradient is not None:
            self._rows.write_output_gradient(a, gradient)

    @property
    def log_probabilities(self) -> Tensor:
        """Of each example, once every piece has run; float64 of shape [examples]."""
        return self._log_probabilities

    def settle(self, reference: Tensor | None, *, learns: bool) -> float:
        """All log-probabilities are known: the loss. Where the stage learns, each example's gradients get their
        factor."""
        verdict = self._objective.judge(self._log_probabilities, reference)
        if verdict.factors is not None and learns:
            factors = verdict.factors.to(self._sequence.weights)[_members(self._sequence.starts)]
            for a in range(0, len(self._sequence), self._most):
                b = min(a + self._most, len(self._sequence))
                gradient = self._rows.output_gradient(a, b)
                self._rows.write_output_gradient(a, (gradient * factors[a:b, None]).to(gradient.dtype))
        return verdict.loss


def _members(starts: Tensor) -> Tensor:
    """For each token the number of its example in the sequence; int64 of shape [tokens]."""
    begins = (starts[1:] != starts[:-1]).long()
    return torch.nn.functional.pad(begins.cumsum(0), (1, 0))
