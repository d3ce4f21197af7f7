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
FEW = 256

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
        """One token for each row of `probs` [requests, vocabulary], which is overwritten; int32 ids."""
        if not simple_sampling_case:
            _exclude(probs, sampling_info)
        drawn = torch.multinomial(probs, 1, generator=self._own_generator(probs.device)).view(-1)
        for row, seed, index in self._seeded:
            drawn[row] = torch.argmax(probs[row] / _noise(seed, index, probs.shape[1]).to(probs.device))
        return drawn.to(torch.int32), None

    def _own_generator(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            # SGLang's seed, which is the same on every rank: all of them must draw the same token.
            self._generator = torch.Generator(device).manual_seed(get_server_args().random_seed)
        return self._generator


def _exclude(probs: Tensor, info: SamplingBatchInfo) -> None:
    """Set to zero, in place, what top-k, top-p and min-p exclude.

    All three keep a beginning of the tokens in descending order. It is short as a rule, and finding the `FEW`
    likeliest of 49,152 tokens takes a thirtieth of the time of sorting them.
    """
    vocabulary = probs.shape[1]
    limits = torch.stack([info.top_ks.to(torch.float64), info.top_ps.double(), info.min_ps.double()], 1)
    limited = (limits[:, 0] < vocabulary) | (limits[:, 1] < 1.0) | (limits[:, 2] > 0.0)
    rows = limited.nonzero()[:, 0]
    top_k, top_p, min_p = limits[rows].unsqueeze(-1).unbind(1)
    candidates = probs[rows]
    for count in (min(FEW, vocabulary), vocabulary):
        ordered, tokens = candidates.topk(count)
        excluded = torch.arange(count, device=probs.device) >= top_k
        excluded |= ordered.cumsum(-1) - ordered > top_p
        excluded |= ordered < ordered[:, :1] * min_p
        if excluded[:, -1].all():
            break  # and so are all that are less likely
    kept = ordered.masked_fill_(excluded, 0.0)
    probs[rows] = torch.zeros_like(candidates).scatter_(1, tokens, kept)


def _noise(seed: int, index: int, vocabulary: int) -> Tensor:
    """Exp(1) variates of shape [vocabulary], a function of the arguments on every machine."""
    philox = np.random.Philox(key=(seed % 2**64) << 64 | index)
    noise = np.random.Generator(philox).standard_exponential(vocabulary, dtype=np.float32)
    # The generator may return 0, and 0 / 0 would win the race.
    return torch.from_numpy(np.maximum(noise, np.finfo(np.float32).tiny))


base.register_sampler_backend(NAME, RequestSampler)
