"""Whether served tokens are greedy, told by one pass over prompt and answer instead of generating again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TIE = 1e-4
"""Logits this close to the highest count as highest: fp32 sums in another order may choose either."""

Answer = tuple[Sequence[int], Sequence[int]]
"""Prompt and served tokens."""


def wrong_tokens(model: Any, answers: Sequence[Answer]) -> list[str]:
    """A line for each answer with a token that `model` would not have chosen after what precedes it.

    Up to the first wrong token this says what generating would say; answers are padded at their end, which
    causal attention never looks back from.
    """
    answers = [(prompt, served) for prompt, served in answers if len(served)]
    if not answers:
        return []
    rows = torch.zeros(len(answers), max(len(p) + len(s) for p, s in answers), dtype=torch.long)
    for row, (prompt, served) in zip(rows, answers, strict=True):
        row[: len(prompt) + len(served)] = torch.tensor([*prompt, *served])
    with torch.no_grad():
        # A mask of ones, so that transformers does not take restarting values for packed positions.
        logits = model(rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    wrong = []
    for index, (prompt, served) in enumerate(answers):
        own = logits[index, len(prompt) - 1 : len(prompt) + len(served) - 1]
        short = own.max(dim=1).values - own.gather(1, torch.tensor(served)[:, None])[:, 0]
        if bool((short > TIE).any()):
            at = int((short > TIE).nonzero()[0])
            wrong.append(
                f"prompt of {len(prompt)}: token {at} is {served[at]}, greedy is {int(own[at].argmax())} "
                f"({float(short[at]):.2g} higher)"
            )
    return wrong
