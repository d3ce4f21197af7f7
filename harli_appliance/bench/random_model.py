"""A Hugging Face folder of given shapes with random weights: times as a trained model does, and needs no download.

``python -m harli_appliance.bench.random_model SHAPES FOLDER`` writes it, in bfloat16, a file a layer. Answers are
nonsense. Knows the layout of a Llama checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from harli_appliance.bench.device_shapes import SHAPES, Shapes

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Without a space before the content, which would become one token with its first word: an answer must leave the
tokens of what comes before it as they are, or it cannot be trained on."""
SPREAD = 0.02
DRAWN = 1 << 24
"""Random numbers that are drawn; longer tensors repeat them, which costs a fraction of drawing billions."""


def write_random_model(shapes: Shapes, folder: Path) -> None:
    """Write configuration, tokenizer and weights; replaces what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(shapes.vocabulary)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.inner,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.hidden // shapes.heads,
        "vocab_size": shapes.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    drawn = SPREAD * torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(torch.bfloat16)
    where: dict[str, str] = {}
    total = 0
    for file, group in _files(shapes):
        tensors = {name: _filled(shape, drawn) for name, shape in group.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer(vocabulary: int) -> Tokenizer:
    """Bytes, and words of one and two letters after a space: prompts of an exact length are made of such words.
    Before them come numbers for all other tokens, so that an answer has text at each: its reader times text.
    (Rows of the head that repeat leave an answer to the lowest tokens, which are numbers.)"""
    space, letters = "Ġ", string.ascii_lowercase
    merges = [(space, letter) for letter in letters]
    merges += [(space + first, second) for first in letters for second in letters]
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [left + right for left, right in merges]
    tokens = [f"{space}{number}" for number in range(vocabulary - len(words))] + words
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _filled(shape: tuple[int, ...], drawn: Tensor) -> Tensor:
    if len(shape) == 1:  # a norm
        return torch.ones(shape, dtype=drawn.dtype)
    count = math.prod(shape)
    return drawn.repeat(-(-count // len(drawn)))[:count].reshape(shape).clone()


def _files(shapes: Shapes) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Each file's name, and its tensors' shapes."""
    head = shapes.hidden // shapes.heads
    kv, files = shapes.kv_heads * head, shapes.layers + 1
    layer_shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (shapes.hidden, shapes.hidden),
        "self_attn.k_proj": (kv, shapes.hidden),
        "self_attn.v_proj": (kv, shapes.hidden),
        "self_attn.o_proj": (shapes.hidden, shapes.hidden),
        "mlp.gate_proj": (shapes.inner, shapes.hidden),
        "mlp.up_proj": (shapes.inner, shapes.hidden),
        "mlp.down_proj": (shapes.hidden, shapes.inner),
        "input_layernorm": (shapes.hidden,),
        "post_attention_layernorm": (shapes.hidden,),
    }
    for layer in range(shapes.layers):
        yield (
            f"model-{layer + 1:05}-of-{files:05}.safetensors",
            {f"model.layers.{layer}.{name}.weight": shape for name, shape in layer_shapes.items()},
        )
    yield (
        f"model-{files:05}-of-{files:05}.safetensors",
        {
            "model.embed_tokens.weight": (shapes.vocabulary, shapes.hidden),
            "model.norm.weight": (shapes.hidden,),
            "lm_head.weight": (shapes.vocabulary, shapes.hidden),
        },
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    write_random_model(SHAPES[options.shapes], options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
