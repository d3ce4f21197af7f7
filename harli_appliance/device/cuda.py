"""Lanes on an NVIDIA GPU: a stream each, without partitions.

Not yet run on a GPU. Knows torch's streams; does not know what runs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def stream_context() -> Callable[[], AbstractContextManager[None]]:
    """Make a stream; what runs inside the returned context is on it, and done when the context is left."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextmanager
    def on_stream() -> Iterator[None]:
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    return on_stream


def gpu_name() -> str:
    return str(torch.cuda.get_device_name())
