"""Prompts of an exact length in the served model's tokens, made of its own words. Seeded.

A prompt is a run of words that are one token each wherever they stand. Blocks of words that requests of a trace
share are the same text, so that the prefix cache finds what it found in the original. Knows tokenizer files only.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from tokenizers import Tokenizer

from harli_appliance.bench.traces import Trace
from harli_appliance.bench.workload import PlannedRequest
from harli_appliance.errors import ConfigError

WORDS = 400
_SPACED_WORD = re.compile(r"[Ġ▁][a-z]+")


class Prompts:
    """Text of any number of tokens.

    Args:
        folder: of the model; needs its tokenizer.json.

    Raises:
        ConfigError: there is no tokenizer.json, or it knows too few words.
    """

    def __init__(self, folder: Path) -> None:
        self._words = one_token_words(folder)

    def plan(self, trace: Trace, overhead: int, salt: str) -> list[PlannedRequest]:
        """What to send: each request with a text of its length, at least one word, and its answer's length.

        Args:
            overhead: tokens that the chat template adds to a message.
            salt: another one gives other words, so that nothing is found in the prefix cache that an earlier
                replay of the same trace left there.
        """
        return [
            PlannedRequest(
                index,
                request.at_s,
                self._text(
                    request.prompt_tokens - overhead, request.prefix, trace.block_tokens, f"{salt} {index}"
                ),
                request.output_tokens,
            )
            for index, request in enumerate(trace.requests)
        ]

    def words(self, count: int, salt: str) -> str:
        """So many words, each one token."""
        return " ".join(random.Random(salt).choices(self._words, k=count))

    def _text(self, tokens: int, prefix: tuple[int, ...], block_tokens: int, salt: str) -> str:
        wanted = max(1, tokens)
        words: list[str] = []
        for block in prefix:
            # Requests of one replay share these; the salt without the request's number is the replay's.
            draw = random.Random(f"{salt.rpartition(' ')[0]} block {block}")
            words += draw.choices(self._words, k=block_tokens)
        if len(words) < wanted:
            words += random.Random(salt).choices(self._words, k=wanted - len(words))
        return " ".join(words[:wanted])


def one_token_words(folder: Path) -> list[str]:
    """Words that, after a space, are one token of the model in `folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; prompts of an exact length need it", param="model")
    tokenizer = Tokenizer.from_file(str(path))
    found: list[str] = []
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if _SPACED_WORD.fullmatch(token) is None:
            continue
        word = token[1:]
        pair = tokenizer.encode(f"a {word} {word}", add_special_tokens=False).ids
        if pair[-2:] == [number, number]:
            found.append(word)
        if len(found) == WORDS:
            break
    if len(found) < 2:
        raise ConfigError(f"{path}: knows too few words to make prompts of", param="model")
    return found
