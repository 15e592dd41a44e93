"""config.json → spec: every family, old and new spellings, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models.fetch import resolve
from pagelab.models.hf_config import read_config
from pagelab.models.registry import expected_weights, load_spec
from pagelab.models.spec import ModelSpec, RopeScaling
from tests.support.tiny_models import BOS, EOS, MAX_POSITION, TINY, VOCAB, tiny_model, tiny_source

LLAMA = ModelSpec(
    architecture="llama",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=MAX_POSITION,
    norm_eps=1e-6,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)
SPECS = {
    "llama": dataclasses.replace(LLAMA, tied_embeddings=True),
    "llama3": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
    "llama-bias": dataclasses.replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral": dataclasses.replace(LLAMA, architecture="mistral", head_dim=32),
    "qwen2": dataclasses.replace(LLAMA, architecture="qwen2", qkv_bias=True, tied_embeddings=True),
    "qwen3": dataclasses.replace(
        LLAMA, architecture="qwen3", head_dim=32, num_layers=3, qk_norm=True
    ),
    "gpt2": dataclasses.replace(
        LLAMA,
        architecture="gpt2",
        intermediate_size=256,
        num_kv_heads=4,
        norm="layernorm",
        norm_eps=1e-5,
        positions="learned",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    ),
}


def changed(name: str, folder: Path, remove: tuple[str, ...] = (), **fields: Any) -> Path:
    """A folder with a tiny model's config.json, some fields changed and some removed."""
    config = json.loads((tiny_model(name) / "config.json").read_text()) | fields
    for field in remove:
        config.pop(field, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", TINY)
def test_the_spec_of_every_architecture(name: str) -> None:
    assert load_spec(tiny_source(name)) == SPECS[name]


@pytest.mark.parametrize("name", TINY)
def test_expected_weights_count_the_spec_s_parameters(name: str) -> None:
    total = 0
    for shape in expected_weights(SPECS[name]).values():
        size = 1
        for length in shape:
            size *= length
        total += size
    assert total == SPECS[name].num_parameters


def test_old_files_keep_rope_at_the_top(tmp_path: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = changed(
        "llama", tmp_path, ("rope_parameters",), rope_theta=500000.0, rope_scaling=scaling
    )
    spec = read_config(folder)
    assert spec.rope_theta == 500000.0
    assert spec.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    changed("llama", tmp_path, ("rope_parameters",), rope_theta=1e6, rope_scaling=None)
    assert read_config(folder).rope_theta == 1e6
    assert read_config(folder).rope_scaling is None


def test_absent_fields_mean_the_family_s_defaults(tmp_path: Path) -> None:
    absent: tuple[str, ...] = ("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act")
    absent += ("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias")
    absent += ("architectures",)
    spec = read_config(changed("llama", tmp_path, absent))
    assert spec == dataclasses.replace(LLAMA, num_kv_heads=4)
    heads = {"num_attention_heads": 32, "hidden_size": 512}
    spec = read_config(changed("mistral", tmp_path, absent, **heads))
    assert (spec.num_kv_heads, spec.head_dim) == (8, 16)
    spec = read_config(changed("qwen3", tmp_path, absent, **heads))
    assert (spec.num_kv_heads, spec.head_dim) == (32, 128)
    spec = read_config(changed("gpt2", tmp_path, (*absent, "n_positions"), n_inner=100))
    assert (spec.max_position, spec.intermediate_size, spec.tied_embeddings) == (1024, 100, True)


def test_ends_come_from_both_files_once_each(tmp_path: Path) -> None:
    changed("llama", tmp_path, eos_token_id=[7, 9])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    assert read_config(tmp_path).eos_token_ids == (9, 5, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    changed("llama", tmp_path, eos_token_id=None)
    assert read_config(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize(
    ("activation", "ours"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_activations_by_transformers_names(tmp_path: Path, activation: str, ours: str) -> None:
    assert read_config(changed("llama", tmp_path, hidden_act=activation)).activation == ours


def test_a_window_as_long_as_the_model_makes_no_difference(tmp_path: Path) -> None:
    assert read_config(changed("mistral", tmp_path, sliding_window=MAX_POSITION))
    assert read_config(changed("qwen2", tmp_path, sliding_window=4))  # use_sliding_window: false


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("llama", {"model_type": None}, "model_type is None"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type.*yarn"),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type is 'linear'",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("mistral", {"sliding_window": 100}, "sliding_window is 100"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    ],
)
def test_options_that_we_lack_are_named(
    tmp_path: Path, name: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read_config(changed(name, tmp_path, **fields))


def test_a_window_that_mistral_implies_is_refused(tmp_path: Path) -> None:
    fields = {"max_position_embeddings": 32768}
    with pytest.raises(UnsupportedModelError, match="sliding_window is 4096"):
        read_config(changed("mistral", tmp_path, ("sliding_window",), **fields))


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads is True"),
        ("llama", {"num_key_value_heads": 3}, "cannot share 3"),
        ("llama", {"head_dim": 15}, "even head_dim"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"eos_token_id": ["</s>"]}, "eos_token_id"),
        ("llama", {"bos_token_id": "<s>"}, "bos_token_id"),
        ("llama", {"rope_parameters": 7}, "rope_parameters is 7"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3"}}, "factor is missing"),
        ("gpt2", {"n_embd": 66}, "n_embd 66"),
    ],
)
def test_fields_that_cannot_be_are_named(
    tmp_path: Path, name: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(CorruptModelError, match=named):
        read_config(changed(name, tmp_path, **fields))


def test_a_broken_config_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    for text in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CorruptModelError, match=r"config\.json"):
            read_config(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_spec_and_tokenizer_need_neither_torch_nor_transformers(kind: str) -> None:
    from tests.support.tiny_models import tiny_gguf

    path = tiny_model("llama") if kind == "folder" else tiny_gguf("llama")
    code = (
        "import sys\n"
        "from pagelab.models.fetch import resolve\n"
        "from pagelab.models.registry import load_spec, load_tokenizer\n"
        f"source = resolve({str(path)!r})\n"
        "load_spec(source)\n"
        "load_tokenizer(source).encode('hello')\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_specs_of_a_folder_and_its_gguf_agree() -> None:
    from tests.support.tiny_models import GGUF_ARCHITECTURES, tiny_gguf

    for name, architecture in GGUF_ARCHITECTURES.items():
        spec = dataclasses.replace(SPECS[name], architecture=architecture)
        assert load_spec(resolve(tiny_gguf(name))) == spec
