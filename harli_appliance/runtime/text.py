"""Between text and tokens: the model's chat template, its tokenizer, and decoding token by token.

Knows transformers' tokenizers; does not know SGLang or HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from harli_appliance.errors import UsageError


class TextCodec:
    """Encodes conversations and makes `Decoder`s, for the model in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if not self._tokenizer.chat_template:
            raise UsageError(
                f"{folder} has no chat template in its tokenizer_config.json; use an instruct model",
                param="model",
            )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        generation_prompt: bool = True,
        most_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat format.

        Args:
            generation_prompt: whether the opening of an assistant turn is appended.
            most_tokens: what is sure to have more is refused, without taking the seconds to count them.

        Raises:
            UsageError: it has, or the template refuses the conversation (roles in an order it does not know, say).
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise UsageError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if most_tokens is not None and self._least_tokens(text, most_tokens) > most_tokens:
            raise UsageError(
                f"{len(text)} characters of the messages exceed the context of {most_tokens} tokens; shorten them",
                code="context_length_exceeded",
                param="messages",
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _least_tokens(self, text: str, enough: int) -> int:
        """A lower bound of a text's tokens, in a hundredth of the time of encoding it."""
        least = len(text) // self._longest_token
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        if least > enough and normalizer is not None:  # composed accents, say, are fewer characters
            least = len(normalizer.normalize_str(text)) // self._longest_token
        return least

    @cached_property
    def _longest_token(self) -> int:
        """No token stands for more characters; where tokens are written byte by byte, it is their bytes."""
        return max(map(len, self._tokenizer.get_vocab()))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text as the model reads it, with its end where the model has a token for that."""
        ids: list[int] = self._tokenizer.encode(text)
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def decoder(self, stop: Sequence[str] = ()) -> Decoder:
        return Decoder(self._tokenizer.backend_tokenizer, stop)

    @cached_property
    def _pieces(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character. The first call takes up to a second."""
        piece: bytes = self._pieces.decode_bytes([token])
        return piece


class Decoder:
    """Turns one answer's tokens into text as they come.

    Never emits part of a UTF-8 character, nor a stop string or the beginning of one. `settled` counts the
    tokens, from the first on, whose text has been emitted or is sure to be empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self._stopped = False
        self._decoded = 0  # characters
        self._emitted = 0
        self._starts: deque[int] = deque()  # of the tokens that are not settled, in characters
        self.settled = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is certain after these tokens; may be empty."""
        if self._stopped:
            return ""
        for token in tokens:
            text = self._stream.step(self._tokenizer, token) or ""
            self._starts.append(self._decoded)
            self._decoded += len(text)
            self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._undecided())

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return "" if self._stopped else self._take(len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._emitted += length
        while self._starts and self._starts[0] < self._emitted:
            self._starts.popleft()
            self.settled += 1
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
