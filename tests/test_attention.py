"""The CPU attention backend against softmax attention written out in float64."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import Serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, at import
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from harli_appliance.runtime import attention_cpu, attention_plan
    from harli_appliance.runtime.attention_resident import ROOM, STEPS_BEFORE, ResidentKV

SLOTS, POSITIONS = 4096, 512


@dataclass(frozen=True)
class Case:
    """A batch: request i has `lengths[i]` tokens in the cache, of which the last `new[i]` are computed now."""

    lengths: Sequence[int]
    new: Sequence[int]
    kv_heads: int = 2
    groups: int = 4
    size: int = 16
    window: int = -1
    cap: float = 0.0
    seed: int = 0


class Rig:
    """A backend on a cache in which everything that is nobody's is NaN."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        total, width = sum(case.lengths), (case.kv_heads, case.size)
        self.case = case
        self.table = table = torch.full((len(case.lengths) + 3, POSITIONS), SLOTS - 1, dtype=torch.int32)
        self.keys, self.values = normal(total, *width), normal(total, *width)
        self.query = normal(sum(case.new), case.kv_heads * case.groups * case.size)
        slots = torch.randperm(SLOTS, generator=generator)[:total].to(torch.int32)
        lines = torch.randperm(len(case.lengths) + 3, generator=generator)[: len(case.lengths)]
        self.k_cache, self.v_cache = torch.full((2, SLOTS, *width), torch.nan)
        fresh, begin = [], 0
        for line, length, new in zip(lines.tolist(), case.lengths, case.new, strict=True):
            own = slots[begin : begin + length]
            table[line, :length] = own
            self.k_cache[own[:-new].long()] = self.keys[begin : begin + length - new]
            self.v_cache[own[:-new].long()] = self.values[begin : begin + length - new]
            fresh.append(torch.arange(begin + length - new, begin + length))
            begin += length
        self.fresh = torch.cat(fresh)
        self.batch = SimpleNamespace(
            req_pool_indices=lines,
            seq_lens=torch.tensor(case.lengths),
            extend_seq_lens=torch.tensor(case.new),
            extend_prefix_lens=torch.tensor(case.lengths) - torch.tensor(case.new),
            out_cache_loc=slots[self.fresh].long(),
            encoder_lens=None,
        )
        self.backend = attention_cpu.CpuAttentionBackend(
            SimpleNamespace(
                device="cpu",
                req_to_token_pool=SimpleNamespace(req_to_token=table),
                token_to_kv_pool=self,
            )
        )

    # What the backend asks of SGLang's KV pool.

    def get_key_buffer(self, layer_id: int) -> Tensor:
        cache: Tensor = self.k_cache
        return cache

    def get_value_buffer(self, layer_id: int) -> Tensor:
        cache: Tensor = self.v_cache
        return cache

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.k_cache, self.v_cache

    def get_kv_size_bytes(self) -> tuple[int, int]:
        return self.k_cache.nbytes, self.v_cache.nbytes

    def set_kv_buffer(self, layer: object, location: Any, k: Tensor, v: Tensor) -> None:
        self.k_cache[location.loc], self.v_cache[location.loc] = k, v

    def layer(self, **other: Any) -> SimpleNamespace:
        case = self.case
        values = {
            "layer_id": 0,
            "tp_q_head_num": case.kv_heads * case.groups,
            "tp_k_head_num": case.kv_heads,
            "qk_head_dim": case.size,
            "v_head_dim": case.size,
            "scaling": 0.3,
            "logit_cap": case.cap,
            "sliding_window_size": case.window,
            "is_cross_attention": False,
            "attn_type": AttentionType.DECODER,
        }
        return SimpleNamespace(**(values | other))

    def run(self, kind: str, **layer: Any) -> Tensor:
        forward = getattr(self.backend, f"forward_{kind}")
        self.batch.forward_mode = ForwardMode.DECODE if kind == "decode" else ForwardMode.EXTEND
        self.backend.init_forward_metadata(self.batch)
        k, v = self.keys[self.fresh], self.values[self.fresh]
        out: Tensor = forward(self.query, k, v, self.layer(**layer), self.batch)
        return out

    def expected(self, *, causal: bool = True) -> Tensor:
        case, rows, key_begin, begin = self.case, [], 0, 0
        for length, new in zip(case.lengths, case.new, strict=True):
            k, v = (
                part[key_begin : key_begin + length].double().repeat_interleave(case.groups, 1)
                for part in (self.keys, self.values)
            )
            q = self.query[begin : begin + new].double().view(new, -1, case.size)
            logits = torch.einsum("qhd,khd->hqk", q, k) * 0.3
            if case.cap > 0:
                logits = case.cap * torch.tanh(logits / case.cap)
            at, key = torch.arange(length - new, length)[:, None], torch.arange(length)
            if causal:
                logits[:, key > at] = -torch.inf
            if case.window >= 0:
                logits[:, key < at - case.window] = -torch.inf
            rows.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1))
            key_begin, begin = key_begin + length, begin + new
        return torch.cat(rows).float()


shapes = {
    "kv_heads": st.sampled_from([1, 2, 3]),
    "groups": st.sampled_from([1, 3, 4]),
    "size": st.sampled_from([8, 16, 64]),
    "window": st.sampled_from([-1, -1, 0, 7, 100]),
    "cap": st.sampled_from([0.0, 0.0, 5.0]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), shape=st.fixed_dictionaries(shapes))
def test_decode_is_softmax_attention(lengths: list[int], shape: dict[str, Any]) -> None:
    rig = Rig(Case(lengths, [1] * len(lengths), **shape))
    torch.testing.assert_close(rig.run("decode"), rig.expected(), atol=2e-5, rtol=1e-5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.integers(0, 120), st.integers(1, 90)), min_size=1, max_size=5),
    shape=st.fixed_dictionaries(shapes),
)
def test_extend_is_causal_softmax_attention(parts: list[tuple[int, int]], shape: dict[str, Any]) -> None:
    rig = Rig(Case([old + new for old, new in parts], [new for _, new in parts], **shape))
    torch.testing.assert_close(rig.run("extend"), rig.expected(), atol=2e-5, rtol=1e-5)


def test_layers_with_different_windows_share_a_step() -> None:
    """As Gemma's do: a plan made for one kind of layer must not serve the other."""
    rig = Rig(Case([40, 200, 3], [1, 1, 1]))
    full = rig.expected()
    windowed = Rig(Case([40, 200, 3], [1, 1, 1], window=10)).expected()
    layers = [rig.layer(), rig.layer(sliding_window_size=10), rig.layer()]
    rig.batch.forward_mode = ForwardMode.DECODE
    rig.backend.init_forward_metadata(rig.batch)
    k, v = rig.keys[rig.fresh], rig.values[rig.fresh]
    for layer, expected in zip(layers, (full, windowed, full), strict=True):
        out = rig.backend.forward_decode(rig.query, k, v, layer, rig.batch)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


def test_a_step_forgets_the_plan_of_the_one_before() -> None:
    rig = Rig(Case([30, 31], [1, 1]))
    rig.run("decode")
    rig.batch.seq_lens = rig.batch.seq_lens.flip(0)
    rig.batch.req_pool_indices = rig.batch.req_pool_indices.flip(0)
    rig.batch.out_cache_loc = rig.batch.out_cache_loc.flip(0)
    rig.query, rig.fresh = rig.query.flip(0), rig.fresh.flip(0)
    again = rig.run("decode")
    rig.query = rig.query.flip(0)
    torch.testing.assert_close(again.flip(0), rig.expected(), atol=2e-5, rtol=1e-5)


def test_attention_in_both_directions_is_left_to_sglang() -> None:
    rig = Rig(Case([20, 33], [20, 33]))
    out = rig.run("extend", attn_type=AttentionType.ENCODER_ONLY)
    torch.testing.assert_close(out, rig.expected(causal=False), atol=2e-5, rtol=1e-5)


class Decoding(Rig):
    """A batch that decodes on: every step appends one token to each request."""

    def __init__(self, lengths: Sequence[int], **shape: Any) -> None:
        super().__init__(Case(list(lengths), [1] * len(lengths), **shape))
        self.generator = torch.Generator().manual_seed(9)
        setattr(self.backend._workspace, "gather", self.counted(self.backend._workspace.gather))  # noqa: B010
        self.gathered = 0
        self.unused = sorted(set(range(SLOTS - 1)) - set(self.table[:, :].flatten().tolist()))

    def counted(self, gather: Any) -> Any:
        def count(*args: Any) -> Any:
            self.gathered += 1
            return gather(*args)

        return count

    def check(self) -> None:
        torch.testing.assert_close(self.run("decode"), self.expected(), atol=2e-5, rtol=1e-5)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of each request."""
        ends = list(itertools.accumulate(self.case.lengths))
        return [
            (self.keys[end - length : end], self.values[end - length : end])
            for end, length in zip(ends, self.case.lengths, strict=True)
        ]

    def append(self) -> None:
        """Every request grows by a token, into a slot from anywhere."""
        lengths, k_parts, v_parts, slots = list(self.case.lengths), [], [], []
        width = self.keys.shape[1:]
        for at, (k, v) in enumerate(self.split()):
            k_parts.append(torch.cat([k, self.normal(1, *width)]))
            v_parts.append(torch.cat([v, self.normal(1, *width)]))
            slots.append(self.unused.pop())
            self.table[self.batch.req_pool_indices[at], lengths[at]] = slots[-1]
        self.keys, self.values = torch.cat(k_parts), torch.cat(v_parts)
        self.case = replace(self.case, lengths=[length + 1 for length in lengths])
        self.query = self.normal(*self.query.shape)
        self.fresh = torch.tensor(self.case.lengths).cumsum(0) - 1
        self.batch.seq_lens = torch.tensor(self.case.lengths)
        self.batch.out_cache_loc = torch.tensor(slots)


@pytest.mark.parametrize("lengths", [[50], [40, 40, 40], [9, 70, 33], [300, 4, 290, 7, 5]])
@pytest.mark.parametrize("budget", [0, 2**24])
def test_a_batch_that_decodes_on_adds_a_row_a_step(lengths: list[int], budget: int) -> None:
    rig = Decoding(lengths, size=64)
    rig.backend._resident = ResidentKV(budget)
    if budget:  # memory has been used before
        rig.backend._resident._memory = torch.full((budget // 4,), torch.nan).view(torch.uint8)
    rig.check()
    for _ in range(ROOM + STEPS_BEFORE + 5):  # past the room that the held rows have
        rig.append()
        rig.check()
    assert rig.gathered >= ROOM if budget == 0 else rig.gathered < STEPS_BEFORE * len(lengths)


def test_what_ran_in_between_ends_what_is_held() -> None:
    """The same slots hold another prompt's rows now; only the step in between tells."""
    rig = Decoding([30, 41])
    for _ in range(STEPS_BEFORE + 2):
        rig.check()
        rig.append()
    rig.k_cache.mul_(-2.0)
    rig.keys.mul_(-2.0)
    other = Rig(Case([5], [5]))
    other.batch.forward_mode = ForwardMode.EXTEND
    rig.backend.init_forward_metadata(other.batch)
    rig.check()


def test_requests_in_another_order_end_what_is_held() -> None:
    rig = Decoding([30, 30])
    for _ in range(STEPS_BEFORE + 2):
        rig.check()
        rig.append()
    flipped = rig.split()[::-1]
    rig.keys, rig.values = (torch.cat([pair[part] for pair in flipped]) for part in (0, 1))
    rig.query = rig.query.flip(0)
    rig.batch.req_pool_indices = rig.batch.req_pool_indices.flip(0)
    rig.batch.out_cache_loc = rig.batch.out_cache_loc.flip(0)
    rig.check()


def test_a_request_that_leaves_ends_what_is_held() -> None:
    rig = Decoding([30, 41, 12])
    for _ in range(STEPS_BEFORE + 2):
        rig.check()
        rig.append()
    keep = [0, 2]
    spans = rig.split()
    rig.keys, rig.values = (torch.cat([spans[at][part] for at in keep]) for part in (0, 1))
    rig.case = replace(rig.case, lengths=[rig.case.lengths[at] for at in keep], new=[1, 1])
    rig.query = rig.query[keep]
    rig.fresh = torch.tensor(rig.case.lengths).cumsum(0) - 1
    for name in ("req_pool_indices", "seq_lens", "out_cache_loc"):
        setattr(rig.batch, name, getattr(rig.batch, name)[keep])
    rig.check()
    rig.append()
    rig.check()


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40), width=st.sampled_from([32, 192, 1024])
)
def test_padding_is_bounded(lengths: list[int], width: int) -> None:
    table = torch.zeros(40, 3000, dtype=torch.int32)
    requests = torch.arange(len(lengths))
    plan = attention_plan.plan_decode(table, requests, lengths, window=-1, width=width, dtype=torch.float32)
    order = plan.order.tolist() if plan.order is not None else list(range(len(lengths)))
    assert sorted(order) == list(range(len(lengths)))
    assert [group.begin for group in plan.groups] == [0, *(group.end for group in plan.groups[:-1])]
    assert plan.groups[-1].end == len(lengths)
    for group in plan.groups:
        members = [lengths[at] for at in order[group.begin : group.end]]
        padded, real = len(members) * group.length, sum(members)
        assert group.length == max(members)
        assert (
            padded <= attention_plan.PADDED_TO_REAL * real
            or (padded - real) * width <= attention_plan.CHEAP_PADDING
        )
        assert len(members) == 1 or padded * width <= attention_plan.CACHED_NUMBERS


def test_sglang_runs_on_it(serving: Serving) -> None:
    runner = serving.runtime.scheduler.tp_worker.model_runner
    assert type(runner.attn_backend) is attention_cpu.CpuAttentionBackend
