"""Penalties of requests that SGLang retracted: what their answers have already counts when they go on.

SGLang keeps in a batch what its penalties and `min_new_tokens` have seen, and begins from nothing when it reads a
prompt. For a request that was retracted when the cache was full, that "prompt" ends with a part of its answer.
Knows SGLang's penalizers; does not know why a request was retracted.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.penaltylib.frequency_penalty import BatchedFrequencyPenalizer
from sglang.srt.sampling.penaltylib.min_new_tokens import BatchedMinNewTokensPenalizer
from sglang.srt.sampling.penaltylib.presence_penalty import BatchedPresencePenalizer
from sglang.srt.sampling.penaltylib.repetition_penalty import BatchedRepetitionPenalizer


def count_answers(batch: Any) -> None:
    """Let the penalizers of a new batch that reads prompts (SGLang's ``ScheduleBatch``) count its answers."""
    orchestrator = batch.sampling_info.penalizer_orchestrator
    prepared = {kind: one for kind, one in orchestrator.penalizers.items() if one.is_prepared()}
    for row, request in enumerate(batch.reqs if prepared else ()):
        if not request.output_ids:
            continue
        tokens = torch.tensor(request.output_ids, dtype=torch.int64, device=orchestrator.device)
        if found := prepared.get(BatchedFrequencyPenalizer):
            penalties = found.frequency_penalties[row].expand(len(tokens))
            found.cumulated_frequency_penalties[row].scatter_add_(0, tokens, penalties)
        if found := prepared.get(BatchedPresencePenalizer):
            found.cumulated_presence_penalties[row, tokens] = found.presence_penalties[row]
        if found := prepared.get(BatchedRepetitionPenalizer):
            found.cumulated_repetition_penalties[row, tokens] = found.repetition_penalties[row]
        if found := prepared.get(BatchedMinNewTokensPenalizer):
            found.len_output_tokens[row] = len(tokens)
