"""How tokens are drawn, in SGLang's terms: its parameters for a request, and what it returns about tokens.

Knows SGLang's sampling parameters and the log-probability fields of its requests, nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.sampling.sampling_params import SamplingParams

from harli_appliance.errors import UsageError
from harli_appliance.runtime.protocol import Sampling, Submission, TokenLogprob

IMPOSSIBLE = -1e30
"""Log-probabilities below this are SGLang's minus infinity, which it clips to the least finite number."""


def check(submission: Submission, vocabulary: int, context: int) -> None:
    """Refuse what cannot be served as asked.

    Args:
        vocabulary: token ids run from 0 to this, exclusive.
        context: most tokens of prompt and answer together.

    Raises:
        UsageError: names the field.
    """
    sampling = submission.sampling
    _check_ids(submission.prompt, vocabulary, "prompt")
    _check_ids(sampling.stop_token_ids, vocabulary, "stop_token_ids")
    if not submission.prompt:
        raise UsageError("the prompt has no tokens; write a message", param="prompt")
    if len(submission.prompt) + sampling.max_tokens > context:
        raise UsageError(
            f"{len(submission.prompt)} tokens of the prompt and {sampling.max_tokens} of the answer exceed the "
            f"context of {context} tokens; shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param="prompt",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise UsageError(
            f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}; lower it",
            param="min_tokens",
        )
    if sampling.ignore_eos and sampling.stop_token_ids:
        # SGLang looks at no token at all when it ignores end tokens.
        raise UsageError(
            "'stop_token_ids' cannot be used with 'ignore_eos'; leave one of them out", param="stop_token_ids"
        )
    if sampling.json_schema is not None and (sampling.ignore_eos or sampling.min_tokens):
        # Where the schema ends, only an end token is allowed.
        field = "ignore_eos" if sampling.ignore_eos else "min_tokens"
        raise UsageError(
            f"'{field}' contradicts 'response_format', which says where the answer ends; leave '{field}' out",
            param=field,
        )


def _check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
        at = next(at for at, token in enumerate(ids) if not 0 <= token < vocabulary)
        raise UsageError(
            f"token {ids[at]} at position {at} of '{param}' is outside of the vocabulary (0 to {vocabulary - 1})",
            param=param,
        )


def sampling_params(wanted: Sampling, tokenizer: Any) -> Any:
    """SGLang's parameters for a request; `tokenizer` measures stop strings."""
    parameters = SamplingParams(
        max_new_tokens=wanted.max_tokens,
        min_new_tokens=wanted.min_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        frequency_penalty=wanted.frequency_penalty,
        presence_penalty=wanted.presence_penalty,
        repetition_penalty=wanted.repetition_penalty,
        sampling_seed=wanted.seed,
        stop=list(wanted.stop) or None,
        stop_token_ids=list(wanted.stop_token_ids) or None,
        ignore_eos=wanted.ignore_eos,
        json_schema=wanted.json_schema,
    )
    parameters.normalize(tokenizer)
    return parameters


def logprobs_of(request: Any, start: int, end: int) -> tuple[TokenLogprob, ...]:
    """What a request (SGLang's ``Req``) that asked for it knows of its answer's tokens from `start` to `end`."""
    found = request.logprob
    chosen = found.output_token_logprobs_val[start:end]
    if not found.top_logprobs_num:
        return tuple(TokenLogprob(float(value)) for value in chosen)
    return tuple(
        TokenLogprob(
            float(value),
            # A constraint may leave fewer tokens possible than were asked for.
            tuple((int(i), float(p)) for i, p in zip(ids, values, strict=True) if p > IMPOSSIBLE),
        )
        for value, ids, values in zip(
            chosen,
            found.output_top_logprobs_idx[start:end],
            found.output_top_logprobs_val[start:end],
            strict=True,
        )
    )
