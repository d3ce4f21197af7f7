"""Random mixes of requests on a running SGLang, judged by transformers and PEFT."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.greedy import wrong_tokens

LONGEST = 700
LENGTHS = sorted({round(LONGEST ** (k / 150)) for k in range(151)})
"""Even steps of the logarithm: lengths of every size, few of them expensive."""
ADAPTERS = ("mix-a", "mix-b")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a mix.

    Attributes:
        tick: step before which it arrives.
        share: the part of its prompt that is taken from the start of `stem`, which others share.
        abort: steps after its arrival at which its client leaves, if it does.
    """

    tick: int
    length: int
    stem: int
    share: float
    seed: int
    count: int
    adapter: str | None
    abort: int | None

    @property
    def prompt(self) -> list[int]:
        shared = int(self.length * self.share)
        return [*_tokens(f"stem {self.stem}", shared), *_tokens(f"own {self.seed}", self.length - shared)]


def _tokens(name: str, count: int) -> list[int]:
    rng = random.Random(name)
    return [rng.randrange(6, 300) for _ in range(count)]


asks = st.builds(
    Ask,
    tick=st.integers(0, 12),
    length=st.sampled_from(LENGTHS),
    stem=st.integers(0, 2),
    share=st.sampled_from((0.0, 0.0, 0.5, 0.9, 1.0)),
    seed=st.integers(0, 10**6),
    count=st.integers(1, 24),
    adapter=st.sampled_from((None, *ADAPTERS)),
    abort=st.one_of(st.none(), st.none(), st.integers(0, 15)),
)
mixes = st.lists(asks, min_size=1, max_size=8)
EXTREMES = [Ask(0, length, 0, 0.5, 0, 8, None, None) for length in (LONGEST, 1)]


@dataclass(slots=True)
class Served:
    """What came of a request."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


def save_random_adapter(model: Any, folder: Path, seed: int) -> None:
    """A LoRA adapter that changes most answers."""
    from peft import LoraConfig, get_peft_model

    from harli_appliance.training.adapter import TARGETS

    config = LoraConfig(r=4 + 2 * seed, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder)


class Judge:
    """Transformers and PEFT on the same model and adapters; `folders` are the adapters' by name."""

    def __init__(self, model: Any, folders: dict[str, Path]) -> None:
        from peft import PeftModel

        self._base = model
        first, *others = folders.items()
        self._peft = PeftModel.from_pretrained(copy.deepcopy(model), first[1], adapter_name=first[0])
        for name, folder in others:
            self._peft.load_adapter(folder, adapter_name=name)
        self._peft.eval()

    def wrong(self, served: Sequence[Served]) -> list[str]:
        found = []
        for adapter in (None, *ADAPTERS):
            answers = [(s.ask.prompt, s.tokens) for s in served if s.ask.adapter == adapter]
            if adapter is not None:
                self._peft.set_adapter(adapter)
            model = self._base if adapter is None else self._peft
            found += [f"{adapter or 'base'}: {line}" for line in wrong_tokens(model, answers)]
        return found


@dataclass
class Bench:
    """A running SGLang and its judge; `seen` counts what the mixes so far have exercised."""

    runtime: Any
    slots: Any
    judge: Judge
    chunk: int
    seen: Counter[str] = field(default_factory=Counter)

    def serve(self, mix: Sequence[Ask], disturb: Callable[[int], None] = lambda tick: None) -> list[Served]:
        """Run a mix to its end; `disturb` is called before every step."""
        from harli_appliance.runtime.protocol import Sampling, Submission

        number = self.seen["mixes"]
        self.seen["mixes"] += 1
        served = {f"mix-{number}-{index}": Served(ask) for index, ask in enumerate(mix)}
        tick, last = 0, max(ask.tick + (ask.abort or 0) for ask in mix)
        while True:
            for name, one in served.items():
                if one.ask.tick == tick:
                    sampling = Sampling(max_tokens=one.ask.count, ignore_eos=True)
                    self.runtime.submit(Submission(name, one.ask.prompt, sampling, one.ask.adapter))
                if one.ask.abort is not None and one.ask.tick + one.ask.abort == tick:
                    self.runtime.abort(name)
            disturb(tick)
            plan = self.runtime.plan()
            if plan is None and tick > last:
                break
            if plan is not None:
                adapters = {served[name].ask.adapter for name in plan.requests}
                self.seen["steps with several adapters"] += len(adapters) > 1
                self._collect(served, self.runtime.execute(plan).tokens)
            self._collect(served, self.runtime.drain())
            tick += 1
        return list(served.values())

    def _collect(self, served: dict[str, Served], brought: Sequence[Any]) -> None:
        for item in brought:
            one = served[item.request]
            assert one.finish is None, f"{item.request} goes on after its end"
            one.tokens += item.tokens
            one.finish = item.finish
            self.seen["cached prompts"] += item.finish is not None and item.cached_tokens > 0

    def check(self, mix: Sequence[Ask]) -> None:
        """Serve a mix; every answer is whole and greedy, and every slot is free or cache again."""
        served = self.serve(mix)
        for one in served:
            if one.ask.abort is None or one.finish == "length":
                assert (one.finish, len(one.tokens)) == ("length", one.ask.count)
            else:
                assert one.finish == "abort"
                self.seen["aborted before a token" if not one.tokens else "aborted amid tokens"] += 1
            self.seen["prompts in chunks"] += one.ask.length > self.chunk
            self.seen["longest"] = max(self.seen["longest"], one.ask.length)
            self.seen["shortest"] = min(self.seen["shortest"] or LONGEST, one.ask.length)
            self.seen["tokens"] += len(one.tokens)
        counts = self.slots.counts()
        assert (counts.serving, counts.free + counts.cached) == (0, self.slots.size)
        assert self.judge.wrong(served) == []


def check_mixes(bench: Bench, count: int) -> Counter[str]:
    """Check `count` random mixes, the same at every run, and the extremes; returns what they exercised."""

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @example(EXTREMES)
    @given(mixes)
    def check(mix: list[Ask]) -> None:
        bench.check(mix)

    check()
    return bench.seen
