"""What the engine and a decode runtime say to each other. Plain data: no torch, no SGLang.

Every method of a runtime but `read_adapter` is called on the thread of the inference lane, one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the defaults are greedy decoding to the end of `max_tokens`.

    Attributes:
        repetition_penalty: divides the logits of tokens already in the answer; 1 changes nothing.
        seed: the same request with the same seed gives the same tokens, whatever runs beside it.
        stop: the answer ends with the token that completes one of these.
        stop_token_ids: tokens that end the answer, beside the model's own.
        ignore_eos: no token ends the answer, `stop` still does; not together with `stop_token_ids`.
        min_tokens: neither end tokens nor `stop_token_ids` are drawn before this many tokens.
        logprobs: most likely tokens to report at each position beside the drawn one; None reports nothing.
        json_schema: JSON text of a schema that the answer, as a whole, is made to satisfy.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as the runtime takes it. `adapter` is an id given to `load_adapter`, None for the base."""

    id: str
    prompt: Sequence[int]
    sampling: Sampling
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The batch that the runtime wants to run next.

    Attributes:
        kind: ``prefill`` (a chunk of one or more prompts) or ``decode`` (one token for each request).
        requests: ids in the batch.
        prefill_tokens: prompt tokens computed in this step (0 for decode).
        context_tokens: KV rows read by attention, summed over the batch.
        handle: the runtime's own object for `launch`.
    """

    kind: Literal["prefill", "decode"]
    requests: tuple[str, ...]
    prefill_tokens: int
    context_tokens: int
    handle: object = field(repr=False, compare=False)


class TokenLogprob(NamedTuple):
    """Natural logarithm of a drawn token's probability, and (token, logarithm) of the most likely ones."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a step brought one request; `finish` is set on its last.

    `logprobs` has one entry for each of `tokens` when the request asked for them: of the model's distribution
    after penalties and constraints, before temperature and top-p.
    """

    request: str
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Result of a step: wall seconds on the lane, and the tokens it produced."""

    seconds: float
    tokens: tuple[NewTokens, ...]


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Requests; `compiling` of the waiting ones wait for their grammar and for no slots."""

    running: int
    waiting: int
    compiling: int = 0


class Runtime(Protocol):
    """A decode engine stepped from outside."""

    @property
    def context_length(self) -> int:
        """Longest prompt plus answer, in tokens."""
        ...

    def check(self, submission: Submission) -> None:
        """Raise `UsageError`, naming the field, when it cannot be served as asked. From any thread."""
        ...

    def submit(self, submission: Submission) -> None: ...
    def abort(self, request_id: str) -> None:
        """End a request wherever it is; its slots are free after the next step. `drain` or a step tells."""
        ...

    def plan(self, *, prompts: bool = True) -> StepPlan | None:
        """The next step, None when there is nothing to do; allocates the step's KV slots.

        Args:
            prompts: whether it may read prompts. When not, it does so only if no answer can go on.
        """
        ...

    def execute(self, plan: StepPlan) -> StepOutcome:
        """Run the step. After an exception, `recover` must be called with the same plan."""
        ...

    def recover(self, plan: StepPlan, error: Exception) -> tuple[NewTokens, ...]:
        """Clean up after a step that failed: its requests end with `error`, the others go on."""
        ...

    def drain(self) -> tuple[NewTokens, ...]:
        """Ends that came about outside of a step (aborted while queued, refused)."""
        ...

    def depth(self) -> QueueDepth: ...
    def read_adapter(self, name: str, path: str) -> Any:
        """The files of an adapter, for `load_adapter`. On any thread.

        Raises:
            UsageError: its files, rank or targets do not fit; says why of `name`.
        """
        ...

    def load_adapter(self, adapter_id: str, files: Any) -> None:
        """Raises `UsageError` when SGLang refuses it."""
        ...

    def unload_adapter(self, adapter_id: str, name: str) -> None: ...
