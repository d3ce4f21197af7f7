"""How tokens are drawn, in SGLang's terms. Knows its sampling parameters and nothing else of it."""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.sampling_params import SamplingParams

from harli_appliance.runtime.protocol import Sampling


def sampling_params(wanted: Sampling, tokenizer: Any) -> Any:
    """SGLang's parameters for a request; `tokenizer` measures stop strings."""
    parameters = SamplingParams(
        max_new_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        frequency_penalty=wanted.frequency_penalty,
        presence_penalty=wanted.presence_penalty,
        sampling_seed=wanted.seed,
        stop=list(wanted.stop) or None,
        ignore_eos=wanted.ignore_eos,
    )
    parameters.normalize(tokenizer)
    return parameters
