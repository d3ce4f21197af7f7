"""Decode graphs on partitions: SGLang's own graph runner with nothing to capture. None of it has run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harli_appliance.runtime.protocol import Sampling, Submission
from tests.conftest import Serving
from tests.test_runtime import prompt, serve

WHOLE, HALF, MOST = (SimpleNamespace(cuda_stream=address) for address in (7, 4096, 8192))
"""Streams, as torch knows them."""


class Backend:
    """An attention backend, of which graphs read buffers."""

    def __init__(self) -> None:
        self.buffers = 0

    def init_cuda_graph_state(self, batch: int, tokens: int) -> None:
        self.buffers += 1


class Graph:
    def __init__(self, stream: Any, backend: Backend) -> None:
        self.stream, self.backend = stream, backend
        self.alive = True

    def reset(self) -> None:
        self.alive = False


@contextmanager
def capturing(stream: Any) -> Iterator[Any]:
    yield SimpleNamespace(stream=stream)


class Rig:
    """SGLang's runner with everything that its `capture` touches but no device, after its first capture.

    Attributes:
        fails_at: number of the stream whose capture fails.
    """

    def __init__(self) -> None:
        self.bound: list[Backend] = []
        self.fails_at: int | None = None
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

        runner: Any = object.__new__(DecodeCudaGraphRunner)
        runner.enable_pdmux = runner.enable_torch_compile = runner.enable_profile_cuda_graph = False
        runner.ragged_verify_mode = runner.dllm_uses_input_embeds = runner.record_nolora_graph = False
        runner.attention_graph_variants = None
        runner.max_bs = runner.max_num_token = 4
        runner.bs = runner.raw_num_token = runner.seq_len_fill_value = runner.captured_req_width = 1
        runner.attn_backend = Backend()
        runner.deepep_adapter = SimpleNamespace(replay=lambda: None)
        runner.backend = SimpleNamespace(capture_session=lambda _: nullcontext(), _graphs={}, _outputs={})
        zeros = {name: torch.zeros(4) for name in ("seq_lens", "seq_lens_cpu", "input_ids", "positions")}
        runner.buffers = SimpleNamespace(**zeros, reset_index_buffers=lambda: None)
        runner.warmup = lambda: None
        runner._capture_one_stream = self._capture
        runner.stream = WHOLE
        runner.model_runner = self.model_runner = SimpleNamespace(
            decode_cuda_graph_runner=runner,
            kv_index_translator=SimpleNamespace(bind_and_verify_backends=self.bound.extend),
            spec_algorithm=SimpleNamespace(is_dflash_family=lambda: False),
        )
        self.runner = runner
        self._capture(None)
        (self.whole,) = self.graphs.values()

    def partitions(self, *streams: Any) -> Any:
        from harli_appliance.runtime.partition_graphs import PartitionGraphs

        return PartitionGraphs(self.model_runner, streams)

    @property
    def graphs(self) -> dict[Any, Graph]:
        graphs: dict[Any, Graph] = self.runner.backend._graphs
        return graphs

    def _capture(self, number: int | None = None) -> None:
        if number is not None and number == self.fails_at:
            raise RuntimeError("out of memory")
        runner, group = self.runner, getattr(self.model_runner, "decode_attn_backend_group", [])
        backend = runner.attn_backend if number is None else group[number]
        key = runner._make_graph_key(1, number)
        runner.backend._graphs[key] = Graph(runner.stream, backend)
        runner.backend._outputs[key] = "logits"

    def replayed(self) -> Graph | None:
        """What the next step would replay, by SGLang's own choice; None: it would be launched kernel by kernel."""
        runner = self.model_runner.decode_cuda_graph_runner
        if runner is None:
            return None
        row = torch.zeros(1)
        runner.load_batch(
            SimpleNamespace(
                needs_forward_metadata_init=lambda: False, input_ids=row, positions=row, input_embeds=None
            )
        )
        graph = self.graphs[runner._replay_graph_key]
        assert runner._replay_attn_backend() is graph.backend, "its buffers are filled before the replay"
        return graph


@pytest.fixture
def rig(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """`serving` has imported SGLang, which warns of much."""
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner
    from sglang.srt.multiplex import pdmux_context

    from harli_appliance.runtime import partition_graphs

    graph = SimpleNamespace(enable_cudagraph_gc=True)
    monkeypatch.setattr(decode_cuda_graph_runner, "get_exec", lambda: SimpleNamespace(graph=graph))
    monkeypatch.setattr(decode_cuda_graph_runner, "graph_capture", capturing)
    for name in ("STREAM_GROUPS", "CURRENT_STREAM_IDX", "CURRENT_STREAM_GROUP"):
        monkeypatch.setattr(pdmux_context, name, getattr(pdmux_context, name))
    monkeypatch.setattr(
        partition_graphs, "build_attention_backends", lambda **_: SimpleNamespace(attn_backend=Backend())
    )
    monkeypatch.setattr(partition_graphs, "free_bytes", lambda: 0)
    return Rig()


def test_every_partition_has_a_set_of_its_own(rig: Rig) -> None:
    rig.partitions(HALF, MOST)
    assert [(key.stream_idx, graph.stream) for key, graph in rig.graphs.items()] == [
        (None, WHOLE),
        (0, HALF),
        (1, MOST),
    ]
    first, second = rig.bound
    assert rig.model_runner.decode_attn_backend_group == [first, second]
    assert (first.buffers, second.buffers, rig.runner.attn_backend.buffers) == (1, 1, 0)


def test_a_step_replays_what_was_captured_on_the_stream_that_it_runs_on(rig: Rig) -> None:
    graphs = rig.partitions(HALF, MOST)
    assert rig.replayed() is rig.whole, "to begin with"
    for stream in (MOST, WHOLE, HALF, MOST, HALF, WHOLE, WHOLE):
        graphs.follow(stream)
        replayed = rig.replayed()
        assert replayed is not None
        assert replayed.stream is stream


@pytest.mark.parametrize("fails_at", [0, 1])
def test_without_graphs_of_its_own_a_partition_never_replays_those_of_the_whole_device(
    rig: Rig, fails_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.fails_at = fails_at
    graphs = rig.partitions(HALF, MOST)
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    assert [*rig.graphs.values()] == [rig.whole], "what was captured holds memory"
    assert rig.model_runner.decode_attn_backend_group == []
    for stream in (HALF, WHOLE, MOST):
        graphs.follow(stream)
        assert rig.replayed() is (rig.whole if stream is WHOLE else None)


def test_graphs_of_partitions_end_before_these_do(rig: Rig) -> None:
    graphs = rig.partitions(HALF, MOST)
    captured = [*rig.graphs.values()]
    graphs.follow(MOST)
    graphs.close()
    assert [graph.alive for graph in captured] == [True, False, False]
    assert len(rig.runner.backend._outputs) == 1


def test_a_step_asks_for_the_graphs_of_the_current_stream(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Any] = []
    monkeypatch.setattr(serving.runtime, "_graphs", SimpleNamespace(follow=followed.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: HALF)
    serve(serving, [Submission("a", prompt(77, 20), Sampling(max_tokens=3, ignore_eos=True))])
    assert followed == [HALF] * 3, "the prompt's step and two of decoding"
