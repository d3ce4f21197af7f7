"""SGLang's sampler with seeds for single requests. Knows its sampler; does not know where seeds come from.

SGLang draws by seed only in its deterministic mode, for every request at once and with operators that a CPU
lacks. Here a row with a seed is drawn by the exponential race argmax(p / e), e ~ Exp(1): noise belongs to a
token of the vocabulary, not to a rank or a place in the batch, so that rounding, which differs between batches,
moves a draw only where two tokens are tied to the last digit. The noise is a function of seed and position in
the answer (Philox, counter-based, Salmon et al. 2011). Rows without a seed are drawn as SGLang does.

All draws use a generator of their own: training, in the same process, neither reseeds it nor is disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sglang.srt.layers.sampler as base
import torch
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

NAME = "pytorch"
"""SGLang chooses this one on a CPU whatever it is told; the registry is asked before its own is built."""

# Read from the environment when that module is imported: log-probabilities before temperature.
base.SGLANG_RETURN_ORIGINAL_LOGPROB = True


class RequestSampler(base.Sampler):  # type: ignore[misc]  # SGLang is untyped here
    """Draws tokens; `expect` tells it whose."""

    def __init__(self) -> None:
        super().__init__()
        self._seeded: tuple[tuple[int, int, int], ...] = ()
        self._generator: torch.Generator | None = None

    def expect(self, requests: Sequence[Any]) -> None:
        """Note the seeds of the batch that is run next, in the order of its rows (SGLang's ``Req``s)."""
        self._seeded = tuple(
            (row, request.sampling_params.sampling_seed, len(request.output_ids))
            for row, request in enumerate(requests)
            if request.sampling_params.sampling_seed is not None
        )

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: SamplingBatchInfo, positions: Tensor, simple_sampling_case: bool
    ) -> tuple[Tensor, None]:
        """One token for each row of `probs` [requests, vocabulary]; int32 ids of shape [requests]."""
        tokens = None
        weights = probs
        if not simple_sampling_case:
            weights, tokens = _eligible(probs, sampling_info)
        drawn = torch.multinomial(weights, 1, generator=self._own_generator(probs.device)).view(-1)
        for row, seed, index in self._seeded:
            noise = _noise(seed, index, probs.shape[1]).to(probs.device)
            if tokens is not None:
                noise = noise[tokens[row]]
            drawn[row] = torch.argmax(weights[row] / noise)
        if tokens is not None:
            drawn = tokens.gather(1, drawn.view(-1, 1)).view(-1)
        return drawn.to(torch.int32), None

    def _own_generator(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            # SGLang's seed, which is the same on every rank: all of them must draw the same token.
            self._generator = torch.Generator(device).manual_seed(get_server_args().random_seed)
        return self._generator


def _eligible(probs: Tensor, info: SamplingBatchInfo) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, zero where top-k, top-p or min-p exclude them, and their token ids."""
    ordered, tokens = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[1], device=probs.device)
    excluded = rank >= info.top_ks.view(-1, 1)
    excluded |= ordered.cumsum(-1) - ordered > info.top_ps.view(-1, 1)
    if info.need_min_p_sampling:
        excluded |= ordered < ordered[:, :1] * info.min_ps.view(-1, 1)
    return ordered.masked_fill_(excluded, 0.0), tokens


def _noise(seed: int, index: int, vocabulary: int) -> Tensor:
    """Exp(1) variates of shape [vocabulary], a function of the arguments on every machine."""
    philox = np.random.Philox(key=(seed % 2**64) << 64 | index)
    noise = np.random.Generator(philox).standard_exponential(vocabulary, dtype=np.float32)
    # The generator may return 0, and 0 / 0 would win the race.
    return torch.from_numpy(np.maximum(noise, np.finfo(np.float32).tiny))


base.register_sampler_backend(NAME, RequestSampler)
