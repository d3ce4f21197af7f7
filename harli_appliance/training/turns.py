"""How a model's chat template writes an example: its tokens, and where the turns that are learned lie in them.

Knows examples and what a template gives; does not know torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from harli_appliance.errors import UsageError
from harli_appliance.training.examples import AnyExample, Example, PreferenceExample, TextExample

LOCATED = 64
"""So many conversations of each number of turns are tried before a template is taken to leave turns alone."""


class ChatEncoder(Protocol):
    """The model's chat template and tokenizer; see `harli_appliance.runtime.text.TextCodec`."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True
    ) -> list[int]: ...

    def encode_text(self, text: str) -> list[int]: ...


def learned_turns(example: Example, tokens: Sequence[int], encoder: ChatEncoder) -> Iterator[slice]:
    """Where the assistant turns that are learned lie among the conversation's tokens.

    Raises:
        UsageError: one cannot be told from what comes before it, because the template writes that in another way
            once more follows, or the tokenizer makes one token of both.
    """
    chat = example.as_chat()
    for index, message in enumerate(example.messages):
        if message.role != "assistant" or message.weight == 0:
            continue
        before = encoder.encode_chat(chat[:index], generation_prompt=True)
        through = tokens
        if index + 1 < len(chat):
            through = encoder.encode_chat(chat[: index + 1], generation_prompt=False)
        if tokens[: len(through)] != through or through[: len(before)] != before:
            raise UsageError(
                "the model's chat template does not leave the tokens of earlier turns as they are, so that an "
                f"answer cannot be told from what it answers (message {index + 1}); this model cannot be "
                "finetuned on it"
            )
        yield slice(len(before), len(through))


class TokenCounter:
    """Tokens of an example as the model reads it, the longer answer's where there are two.

    Raises (when called):
        UsageError: the template refuses the example, or it could not be learned from; see `learned_turns`.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder
        self._located: Counter[int] = Counter()

    def __call__(self, example: AnyExample) -> int:
        if isinstance(example, TextExample):
            return len(self._encoder.encode_text(example.text))
        if isinstance(example, PreferenceExample):
            return max(self._conversation(example.preferred), self._conversation(example.other))
        return self._conversation(example)

    def _conversation(self, example: Example) -> int:
        tokens = self._encoder.encode_chat(example.as_chat(), generation_prompt=False)
        turns = len(example.messages)
        if self._located[turns] < LOCATED:
            self._located[turns] += len(list(learned_turns(example, tokens, self._encoder))) > 0
        return len(tokens)
