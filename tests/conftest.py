"""Shared fixtures: a tiny model with a tokenizer and chat template, made here, and SGLang on it.

SGLang can be started once in a process, so the runtime is one for the whole session; tests leave it idle.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import openai
import pytest

from tests.fakes import FakeAppliance, listening

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from harli_appliance.engine.lanes import Lane
    from harli_appliance.runtime.kv import SglangSlots
    from harli_appliance.runtime.sglang_runtime import SglangRuntime

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = (
    "the a cat dog otter river sings swims makes eats blue green two three who what made is harli by of to"
)


# Before any test module imports transformers, and with the libraries' own warnings left to them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from harli_appliance.runtime import cpu_stand_ins

    cpu_stand_ins.install()
    import peft  # noqa: F401
    import torch
    import torch.nn.attention.varlen  # in a test, with warnings as errors, sentencepiece crashes at the end

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with random weights (fp32) and a byte-level tokenizer trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True, slots=True)
class Serving:
    """SGLang on the tiny model, and the lane that it lives on."""

    runtime: SglangRuntime
    slots: SglangSlots
    lane: Lane
    folder: Path


@pytest.fixture(scope="session")
def serving(tiny_model: Path) -> Iterator[Serving]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from harli_appliance.engine.lanes import Lane
        from harli_appliance.runtime.arguments import RuntimeOptions
        from harli_appliance.runtime.kv import SglangSlots
        from harli_appliance.runtime.sglang_runtime import SglangRuntime

        lane = Lane("inference")
        options = RuntimeOptions(
            tiny_model, pool_slots=4096, max_lora_rank=8, chunked_prefill_tokens=64, max_adapters=2
        )
        runtime = lane.submit(SglangRuntime, options).result()
        slots = lane.submit(SglangSlots, runtime).result()
    yield Serving(runtime, slots, lane, tiny_model)
    lane.close()


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Any:
    """The same model in plain transformers, with weights of its own."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).float().eval()


# -- the API around a fake appliance; a module that wants another one overrides what differs -----------------


@pytest.fixture
def port(tmp_path: Path) -> FakeAppliance:
    return FakeAppliance(tmp_path)


@pytest.fixture
async def url(port: FakeAppliance) -> AsyncIterator[str]:
    async with listening(port) as listener:
        yield listener.url


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        yield session
