"""The examples of a file, encoded as a job's run takes them."""

from __future__ import annotations

from pathlib import Path

from harli_appliance.training.dataset import read_examples
from harli_appliance.training.packing import ChatEncoder, Encoded, encode


def encoded(data: Path, encoder: ChatEncoder) -> list[Encoded]:
    return [encode(example, encoder) for example in read_examples(data)]
