"""Cross-entropy and its gradient in the memory of the logits, so that those exist once and not several times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CrossEntropy = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes and gives what `cross_entropy_` does."""


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """-log p of each target, float of shape [n]; `logits` are overwritten.

    Args:
        logits: float of shape [n, vocabulary]. With `weights` they become the gradient of sum(weights x -log p),
            which is weights x (softmax(logits) - onehot(targets)); else what is in them is undefined.
        targets: int64 of shape [n].
        weights: of shape [n].
    """
    rows = torch.arange(len(targets), device=logits.device)
    logits -= logits.amax(dim=1, keepdim=True)
    found = logits[rows, targets]
    total = logits.exp_().sum(dim=1)
    if weights is not None:
        logits *= (weights / total)[:, None]
        logits[rows, targets] -= weights
    return total.log() - found
