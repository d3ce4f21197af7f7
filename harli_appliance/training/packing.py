"""From examples to packed sequences of tokens with loss weights.

Knows examples and tokens; does not know the model. Of conversations only assistant turns are learned; a turn's
``weight`` (0 or 1, as in OpenAI's format) says whether. Of texts everything is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harli_appliance.training.examples import AnyExample, Example, PreferenceExample, TextExample
from harli_appliance.training.turns import ChatEncoder, learned_turns


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """`learn[i]` says whether predicting `tokens[i]` from what precedes it counts in the loss."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]

    @property
    def learned_tokens(self) -> int:
        return sum(self.learn[1:])

    @property
    def parts(self) -> tuple[EncodedExample, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: two answers to one prompt. Both go into the same sequence."""

    preferred: EncodedExample
    other: EncodedExample

    @property
    def learned_tokens(self) -> int:
        return self.preferred.learned_tokens + self.other.learned_tokens

    @property
    def parts(self) -> tuple[EncodedExample, ...]:
        return (self.preferred, self.other)


Encoded = EncodedExample | EncodedPair


def size_of(item: Encoded) -> int:
    """Tokens that an item takes in a sequence."""
    return sum(len(part.tokens) for part in item.parts)


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Several examples one after the other; attention and positions stay within each.

    `items` are the places that its members had among what was packed, in their order here. All tensors are of
    shape [tokens]. `targets[t]` is the token to predict at t and `weights[t]` its weight in the loss (0 at the
    last token of an example and wherever nothing is learned). `starts[t]` is the index at which the example of
    token t begins.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    targets: Tensor
    weights: Tensor
    items: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> PackedSequence:
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            starts=self.starts.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
        )


def encode(example: AnyExample, encoder: ChatEncoder) -> Encoded:
    """Tokens of an example of any format, and which of them are learned.

    Raises:
        UsageError: see `turns.learned_turns`.
    """
    if isinstance(example, TextExample):
        tokens = tuple(encoder.encode_text(example.text))
        return EncodedExample(tokens, (True,) * len(tokens))
    if isinstance(example, PreferenceExample):
        return EncodedPair(encode_example(example.preferred, encoder), encode_example(example.other, encoder))
    return encode_example(example, encoder)


def encode_example(example: Example, encoder: ChatEncoder) -> EncodedExample:
    """Tokens of a conversation, and which of them are the assistant's.

    Raises:
        UsageError: see `turns.learned_turns`.
    """
    tokens = encoder.encode_chat(example.as_chat(), generation_prompt=False)
    learn = [False] * len(tokens)
    for turn in learned_turns(example, tokens, encoder):
        learn[turn] = [True] * (turn.stop - turn.start)
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


def pack(items: Sequence[Encoded], sequence_tokens: int) -> list[PackedSequence]:
    """First-fit packing; an item longer than `sequence_tokens` gets a sequence of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(items)), key=lambda i: size_of(items[i]), reverse=True):
        size = size_of(items[item])
        for index, left in enumerate(room):
            if size <= left:
                bins[index].append(item)
                room[index] -= size
                break
        else:
            bins.append([item])
            room.append(sequence_tokens - size)
    return [_sequence(items, members) for members in bins]


def _sequence(items: Sequence[Encoded], members: Sequence[int]) -> PackedSequence:
    tokens: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for example in (part for member in members for part in items[member].parts):
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
        items=tuple(members),
    )
