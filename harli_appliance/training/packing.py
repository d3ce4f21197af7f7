"""From conversations to packed sequences of tokens with loss weights.

Knows chat examples and tokens; does not know the model. Only assistant turns are learned; a turn's ``weight``
(0 or 1, as in OpenAI's format) says whether.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harli_appliance.errors import UsageError
from harli_appliance.training.examples import Example


class ChatEncoder(Protocol):
    """The model's chat template and tokenizer; see `harli_appliance.runtime.text.TextCodec`."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """`learn[i]` says whether predicting `tokens[i]` from what precedes it counts in the loss."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]

    @property
    def learned_tokens(self) -> int:
        return sum(self.learn[1:])


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Several examples one after the other; attention and positions stay within each.

    All tensors are of shape [tokens]. `targets[t]` is the token to predict at t and `weights[t]` its weight in
    the loss (0 at the last token of an example and wherever nothing is learned). `starts[t]` is the index at
    which the example of token t begins.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> PackedSequence:
        return PackedSequence(*(getattr(self, name).to(device) for name in self.__slots__))


def encode_example(example: Example, encoder: ChatEncoder) -> EncodedExample:
    """Tokens of a conversation, and which of them are the assistant's.

    Raises:
        UsageError: the chat template rewrites earlier turns, so that an assistant turn cannot be located.
    """
    plain = example.as_chat()
    tokens = encoder.encode_chat(plain, generation_prompt=False)
    learn = [False] * len(tokens)
    for index, message in enumerate(example.messages):
        if message.role != "assistant" or message.weight == 0:
            continue
        before = encoder.encode_chat(plain[:index], generation_prompt=True)
        through = encoder.encode_chat(plain[: index + 1], generation_prompt=False)
        if tokens[: len(through)] != through or through[: len(before)] != before:
            raise UsageError("the model's chat template changes earlier turns; it cannot be trained on")
        learn[len(before) : len(through)] = [True] * (len(through) - len(before))
    return EncodedExample(tuple(tokens), tuple(learn))


def steps_in_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def examples_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of an optimizer step; each epoch is a fresh permutation drawn from the seed.

    A function of the step alone, so that a job resumes at any step without having kept a position.
    """
    epoch, batch = divmod(step, steps_in_epoch(count, batch_size))
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order[batch * batch_size : (batch + 1) * batch_size]


def pack(examples: Sequence[EncodedExample], sequence_tokens: int) -> list[PackedSequence]:
    """First-fit packing; an example longer than `sequence_tokens` gets a sequence of its own."""
    bins: list[list[EncodedExample]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: len(e.tokens), reverse=True):
        size = len(example.tokens)
        for index, left in enumerate(room):
            if size <= left:
                bins[index].append(example)
                room[index] -= size
                break
        else:
            bins.append([example])
            room.append(sequence_tokens - size)
    return [_sequence(members) for members in bins]


def _sequence(members: Sequence[EncodedExample]) -> PackedSequence:
    tokens: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for example in members:
        size = len(example.tokens)
        starts += [len(tokens)] * size
        positions += range(size)
        targets += [*example.tokens[1:], 0]
        weights += [*map(float, example.learn[1:]), 0.0]
        tokens += example.tokens
    return PackedSequence(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        starts=torch.tensor(starts),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights, dtype=torch.float32),
    )
