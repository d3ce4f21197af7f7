"""A llama-architecture GGUF file becomes a Hugging Face folder: float32 weights, tokenizer, configuration.

Knows both formats. Does not know where the file came from, nor torch: numpy is enough, so that a command
line tool can convert without loading it. The conversion is exact: what the GGUF's quantisation means is
written out in float32.

Only what has been checked is accepted: architecture ``llama`` with the ``smollm`` byte-level BPE tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harli_appliance.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: never produced by ordinary text


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    vocabulary: int
    norm_eps: float
    rope_theta: float


def convert(source: Path, target: Path, progress: Callable[[float], None] = lambda _: None) -> None:
    """Write the model of `source` into the existing, empty folder `target`.

    Args:
        source: a GGUF file of llama architecture.
        target: gets config.json, generation_config.json, model.safetensors, tokenizer.json and
            tokenizer_config.json (with the chat template).
        progress: called with the finished share, 0 to 1.

    Raises:
        ConfigError: the file is not a GGUF, is incomplete, or holds a model that is not understood.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ConfigError(f"{source.name}: not a readable GGUF file ({error}); fetch it again") from error
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    _require(fields, "general.architecture", "llama", source)
    _require(fields, "tokenizer.ggml.model", "gpt2", source)
    _require(fields, "tokenizer.ggml.pre", "smollm", source)
    try:
        shape = _shape(fields)
        weights = _weights(reader, shape, progress)
        _write_json(target / "config.json", _config(fields, shape, tied="lm_head.weight" not in weights))
        _write_json(target / "generation_config.json", _special_ids(fields))
        _write_tokenizer(fields, target / "tokenizer.json")
        _write_json(target / "tokenizer_config.json", _tokenizer_config(fields, shape))
    except KeyError as error:
        raise ConfigError(
            f"{source.name}: lacks {error.args[0]!r}; fetch another conversion of it"
        ) from error
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    progress(1.0)


def _require(fields: Mapping[str, Any], key: str, wanted: str, source: Path) -> None:
    if (found := fields.get(key)) != wanted:
        raise ConfigError(f"{source.name}: {key} is {found!r}, but only {wanted!r} can be converted")


def _shape(fields: Mapping[str, Any]) -> _Shape:
    return _Shape(
        hidden=fields["llama.embedding_length"],
        layers=fields["llama.block_count"],
        heads=fields["llama.attention.head_count"],
        kv_heads=fields["llama.attention.head_count_kv"],
        intermediate=fields["llama.feed_forward_length"],
        context=fields["llama.context_length"],
        vocabulary=len(fields["tokenizer.ggml.tokens"]),
        # GGUF keeps it in single precision: 9.99999974e-06 was written as 1e-05.
        norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=float(fields["llama.rope.freq_base"]),
    )


def _weights(reader: Any, shape: _Shape, progress: Callable[[float], None]) -> dict[str, Matrix]:
    import numpy as np
    from gguf.quants import dequantize

    weights: dict[str, Matrix] = {}
    for done, tensor in enumerate(reader.tensors):
        matrix: Matrix = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in _TOP_TENSORS:
            name = _TOP_TENSORS[tensor.name]
        else:
            _, layer, part, kind = tensor.name.split(".")
            if part == "attn_q":
                matrix = _half_split_rotary(matrix, shape.heads)
            elif part == "attn_k":
                matrix = _half_split_rotary(matrix, shape.kv_heads)
            name = f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{kind}"
        weights[name] = matrix
        progress(done / len(reader.tensors))
    return weights


def _half_split_rotary(matrix: Matrix, heads: int) -> Matrix:
    """llama.cpp interleaves the two halves of each head's rotary pairs; Hugging Face keeps them apart."""
    import numpy as np

    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    eos: int = fields["tokenizer.ggml.eos_token_id"]
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
    }


def _config(fields: Mapping[str, Any], shape: _Shape, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **_special_ids(fields),
    }


def _write_tokenizer(fields: Mapping[str, Any], path: Path) -> None:
    """llama.cpp's ``smollm``: each digit alone, then GPT-2's byte-level split and BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (m.split(" ") for m in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    tokenizer.save(str(path), pretty=False)


def _tokenizer_config(fields: Mapping[str, Any], shape: _Shape) -> dict[str, Any]:
    words: list[str] = fields["tokenizer.ggml.tokens"]
    ids = _special_ids(fields)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[ids["bos_token_id"]],
        "eos_token": words[ids["eos_token_id"]],
        "pad_token": words[ids["pad_token_id"]],
        "unk_token": words[fields.get("tokenizer.ggml.unknown_token_id", 0)],
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
