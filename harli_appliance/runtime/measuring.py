"""What a benchmark may do to a runtime: time SGLang's own step, and put SGLang's own CPU operators back.

For measurements only; serving never needs it. Knows SGLang's scheduler and model runner.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from harli_appliance.runtime.projections_cpu import FewRows
from harli_appliance.runtime.sglang_runtime import SglangRuntime


@dataclass(frozen=True, slots=True)
class SglangStep:
    """One step as SGLang itself sees it; `began` is of `time.perf_counter`.

    Attributes:
        seconds: spent in ``get_next_batch_to_run``, ``run_batch`` and ``process_batch_result`` together.
    """

    began: float
    seconds: float
    decode: bool
    requests: int


@contextlib.contextmanager
def timed_steps(runtime: SglangRuntime) -> Iterator[list[SglangStep]]:
    """Collect the steps that are made inside of this context, whoever makes them."""
    scheduler = runtime.scheduler
    steps: list[SglangStep] = []
    began = spent = 0.0

    def timing(function: Callable[..., Any], before: bool, after: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal began, spent
            start = time.perf_counter()
            if before:
                began, spent = start, 0.0
            result = function(*args, **kwargs)
            spent += time.perf_counter() - start
            if after:
                batch = args[0]
                steps.append(SglangStep(began, spent, batch.forward_mode.is_decode(), len(batch.reqs)))
            return result

        return timed

    names = ("get_next_batch_to_run", "run_batch", "process_batch_result")
    for name in names:
        wrapped = timing(getattr(scheduler, name), name == names[0], name == names[-1])
        setattr(scheduler, name, wrapped)
    try:
        yield steps
    finally:
        for name in names:
            delattr(scheduler, name)


class Attention:
    """Changes between the CPU attention of this package and SGLang's, from one step to the next."""

    def __init__(self, runtime: SglangRuntime) -> None:
        self._runner = runtime.scheduler.tp_worker.model_runner
        self._ours = self._runner.attn_backend
        self._sglangs = TorchNativeAttnBackend(self._runner)

    def use(self, *, ours: bool) -> None:
        self._runner.attn_backend = self._ours if ours else self._sglangs


class Projections:
    """The same for the order in which projections of a few rows are computed."""

    def __init__(self, runtime: SglangRuntime) -> None:
        found = (getattr(module, "quant_method", None) for module in runtime.model.modules())
        methods = [method for method in found if isinstance(method, FewRows)]
        self._columns = [(method, method.columns) for method in methods]

    def use(self, *, ours: bool) -> None:
        for method, columns in self._columns:
            method.columns = columns if ours else frozenset()
