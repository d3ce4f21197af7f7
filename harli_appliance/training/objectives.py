"""What a micro-batch minimises, given the log-probability of each of its examples.

Loss units leave for every learned token the gradient of -log p, weighted; an objective that couples examples then
says by which factor each example's gradients count, which is known once all their log-probabilities are. Knows
formulas; knows neither layers nor files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """`loss` of the micro-batch; `factors` of shape [examples], or None where all are 1."""

    loss: float
    factors: Tensor | None = None


class Objective(Protocol):
    @property
    def needs_reference(self) -> bool:
        """Whether the base model's log-probabilities are needed too."""
        ...

    @property
    def token_scale(self) -> float:
        """By what a token's weight is multiplied in the gradient that loss units leave."""
        ...

    def judge(self, logps: Tensor, reference: Tensor | None) -> Verdict:
        """Args: weighted sums of token log-probabilities, float64 of shape [examples], of policy and base."""
        ...


@dataclass(frozen=True, slots=True)
class Likelihood:
    """-(weighted log-probability) / `normaliser`: supervised finetuning and language modelling.

    Args:
        normaliser: learned tokens of the whole optimizer step, so that its micro-batches add up to a mean.
    """

    normaliser: float
    needs_reference: bool = False

    @property
    def token_scale(self) -> float:
        return 1.0 / self.normaliser

    def judge(self, logps: Tensor, reference: Tensor | None) -> Verdict:
        return Verdict(-float(logps.sum()) / self.normaliser)


@dataclass(frozen=True, slots=True)
class Preference:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    Examples come in pairs, the preferred one first. With m = (log p_w - log ref_w) - (log p_l - log ref_l),

        loss = -log sigmoid(beta m) / pairs,  dloss/dlog p_w = -beta sigmoid(-beta m) / pairs = -dloss/dlog p_l.

    Args:
        pairs: pairs of the whole optimizer step.
    """

    beta: float
    pairs: int
    needs_reference: bool = True
    token_scale: float = 1.0

    def judge(self, logps: Tensor, reference: Tensor | None) -> Verdict:
        if reference is None:
            raise ValueError("a preference is judged against the base model's log-probabilities")
        gained = (logps - reference).view(-1, 2)
        margin = self.beta * (gained[:, 0] - gained[:, 1])
        loss = -torch.nn.functional.logsigmoid(margin).sum() / self.pairs
        pull = self.beta * torch.sigmoid(-margin) / self.pairs
        return Verdict(float(loss), torch.stack([pull, -pull], dim=1).flatten())
