"""A tiny random Llama, and decoding it in plain torch: the yardstick for SGLang's step on a CPU.

The decoder is what one would write by hand: a padded static KV cache, one batch, nothing else. Knows torch and the
layout of a checkpoint; does not know SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 128, 352, 8, 2, 16, 1024
EPS, THETA, SPREAD = 1e-6, 10_000.0, 0.3


def write_tiny_model(folder: Path) -> None:
    """A Hugging Face folder with random weights and a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    letters = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    save_file(_random_weights(), folder / "model.safetensors", metadata={"format": "pt"})


def _random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HEADS * SIZE, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * SIZE, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * SIZE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * SIZE),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }

    def random(shape: tuple[int, ...]) -> Tensor:
        return SPREAD * torch.randn(shape, generator=generator)

    weights = {
        "model.embed_tokens.weight": random((VOCABULARY, HIDDEN)),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random((VOCABULARY, HIDDEN)),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {f"{at}{name}.weight": random(shape) for name, shape in shapes.items()}
        weights |= {f"{at}{n}_layernorm.weight": torch.ones(HIDDEN) for n in ("input", "post_attention")}
    return weights


class PlainDecoder:
    """Greedy decoding of the tiny model for one padded batch.

    Args:
        prompts: token ids; they are fed one position at a time.
        room: tokens that every request may grow to.
    """

    def __init__(self, folder: Path, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._weights = load_file(folder / "model.safetensors")
        self._batch = torch.arange(len(prompts))
        shape = (len(prompts), KV_HEADS, room, SIZE)
        self._cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]
        angles = torch.arange(room)[:, None] / THETA ** (torch.arange(0, SIZE, 2) / SIZE)
        angles = torch.cat([angles, angles], dim=-1)
        self._cos, self._sin = angles.cos(), angles.sin()
        self.tokens: list[list[int]] = []
        """Of each step, one for each request."""
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        for step in range(int(last.max()) + 1):
            position = last.clamp(max=step)  # a short prompt waits at its last token
            column = [prompt[at] for prompt, at in zip(prompts, position.tolist(), strict=True)]
            self._next = self._forward(torch.tensor(column), position)
        self._position = last
        self.tokens.append(self._next.tolist())

    def step(self) -> None:
        self._position = self._position + 1
        self._next = self._forward(self._next, self._position)
        self.tokens.append(self._next.tolist())

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The most likely next tokens, [batch], after `tokens` at `position`."""
        weights, batch = self._weights, len(tokens)
        longest = int(position.max()) + 1
        mask = (torch.arange(longest) <= position[:, None])[:, None, None]
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        x = embedding(tokens, weights["model.embed_tokens.weight"])
        for layer, (keys, values) in enumerate(self._cache):
            at = f"model.layers.{layer}."
            h = rms_norm(x, (HIDDEN,), weights[at + "input_layernorm.weight"], EPS)
            q, k, v = (
                linear(h, weights[f"{at}self_attn.{name}_proj.weight"]).view(batch, -1, SIZE)
                for name in "qkv"
            )
            keys[self._batch, :, position] = _rotate(k, cos, sin)
            values[self._batch, :, position] = v
            # The query heads of a KV head are rows of one query: torch would copy K and V for each of them.
            grouped = _rotate(q, cos, sin).view(batch, KV_HEADS, -1, SIZE)
            attended = scaled_dot_product_attention(
                grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask
            )
            x = x + linear(attended.reshape(batch, -1), weights[at + "self_attn.o_proj.weight"])
            h = rms_norm(x, (HIDDEN,), weights[at + "post_attention_layernorm.weight"], EPS)
            gate, up = (linear(h, weights[f"{at}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + linear(silu(gate) * up, weights[at + "mlp.down_proj.weight"])
        x = rms_norm(x, (HIDDEN,), weights["model.norm.weight"], EPS)
        return linear(x, weights["lm_head.weight"]).argmax(dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
