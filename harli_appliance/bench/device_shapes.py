"""Shapes of the models that devices are measured with, and how much of each is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shapes:
    """A Llama's shapes, and how it is decoded and finetuned here: Llama-3-8B in windows and sequences of
    `config.GPU_SIZES`."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    batches: tuple[int, ...]
    context: int
    sequence: int
    window: int
    times: int


SHAPES = {
    shapes.name: shapes
    for shapes in (
        Shapes("tiny", 4, 128, 352, 8, 2, 1024, (1, 4), 64, 64, 32, 5),
        Shapes("smollm2-135m", 30, 576, 1536, 9, 3, 49_152, (1, 8), 256, 256, 128, 5),
        Shapes("llama-3-8b", 32, 4096, 14_336, 32, 8, 128_256, (1, 8, 32, 64, 128), 1024, 2048, 1024, 20),
    )
}
