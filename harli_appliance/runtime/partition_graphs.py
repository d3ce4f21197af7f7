"""SGLang's decode graphs on every partition of a GPU.

A CUDA graph runs on the SMs that it was captured on, so every partition needs its own for each batch size. SGLang
has that for its multiplexing of prefill and decode (``sglang.srt.multiplex``): its graph runner captures a set on
each stream of a list, with an attention backend for each, and replays the set whose number is current. Here it is
given other streams, and no other part of that multiplexing is switched on. Knows SGLang's graph runner and
streams; does not know how the device is split.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import structlog
import torch
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import build_attention_backends
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import model_capture_mode
from sglang.srt.multiplex import pdmux_context

log = structlog.get_logger(__name__)


class PartitionGraphs:
    """The graphs of the whole device, which SGLang has captured, and a set for each partition.

    When these cannot be captured, steps on partitions are launched kernel by kernel, and why is logged.

    Args:
        model_runner: SGLang's, with its graph runner; nothing else may use the device meanwhile.
        streams: of the partitions on which steps will run.
    """

    def __init__(self, model_runner: Any, streams: Sequence[Any]) -> None:
        self._model_runner = model_runner
        self._runner = model_runner.decode_cuda_graph_runner
        self._numbers: dict[int, int | None] = dict.fromkeys(stream.cuda_stream for stream in streams)
        """Of the graphs of each partition, by the address of its stream; None where there are none."""
        started, free = time.perf_counter(), free_bytes()
        why: str | None = None
        try:
            self._capture(streams)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why is not None:  # here, where the error does not hold on to what was captured
            self.close()
            log.warning("no decode graphs on partitions", why=why)
            return
        self._numbers = {address: number for number, address in enumerate(self._numbers)}
        log.info(
            "decode graphs on partitions",
            partitions=len(streams),
            seconds=round(time.perf_counter() - started, 1),
            mib=round((free - free_bytes()) / 2**20),
        )

    def follow(self, stream: Any) -> None:
        """The next step runs on `stream`: replay the graphs that were captured there."""
        partition, number = stream.cuda_stream in self._numbers, self._numbers.get(stream.cuda_stream)
        # Without a graph runner the model runner launches kernel by kernel.
        self._model_runner.decode_cuda_graph_runner = None if partition and number is None else self._runner
        self._runner.enable_pdmux = number is not None
        if number is not None:
            pdmux_context.set_current_stream_idx(number)

    def close(self) -> None:
        """Let go of the partitions' graphs; a partition must outlive them."""
        self._numbers = dict.fromkeys(self._numbers)
        self._runner.enable_pdmux = False
        self._model_runner.decode_attn_backend_group = []
        backend = self._runner.backend
        for key in [key for key in backend._graphs if key.stream_idx is not None]:
            backend._graphs.pop(key).reset()
            backend._outputs.pop(key, None)
        gc.collect()
        torch.cuda.empty_cache()

    def _capture(self, streams: Sequence[Any]) -> None:
        pdmux_context.STREAM_GROUPS = [
            (None, stream) for stream in streams
        ]  # one for prefill, one for decode
        # Graphs read buffers of their attention backend, which the next set of them would take away.
        backends = [build_attention_backends(model_runner=self._model_runner).attn_backend for _ in streams]
        self._model_runner.kv_index_translator.bind_and_verify_backends(backends)
        self._model_runner.decode_attn_backend_group = backends
        self._runner.enable_pdmux = True
        self._runner.maybe_init_pdmux()
        with model_capture_mode():
            self._runner.capture()
        self._runner.enable_pdmux = False


def free_bytes() -> int:
    """Of the device's memory."""
    free, _ = torch.cuda.mem_get_info()
    return free
