"""Shapes to plan with: built-in ones, config.json of any family, GGUF headers; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.memory.layout import DTYPE_BYTES, KVLayout
from pagelab.models import shape_source
from pagelab.models.fetch import ModelSource
from pagelab.models.kv_geometry import KVGroup, page_layout
from pagelab.models.model_shape import ModelShape, shape_of_config, shape_of_spec
from pagelab.models.parameters import count_parameters, dimensions_of
from pagelab.models.registry import load_spec
from pagelab.models.shape_source import built_in_shape, load_shape
from pagelab.models.shapes import BUILT_IN
from tests.support.tiny_models import (
    GGUF_ARCHITECTURES,
    TINY,
    tiny_gguf,
    tiny_model,
    tiny_source,
    write_gguf,
)

# as transformers builds each (checked once by hand on its meta device), tied tensors once
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "opt-13b": 12_853_473_280,
    "gemma-3-270m": 268_098_176,
    "gemma-3-27b": 27_432_406_640 - 423_060_336,  # without the vision tower and its projector
}
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA_LIKE = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-350m-like": (
        "OPTConfig",
        SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gemma": ("GemmaConfig", LLAMA_LIKE | {"head_dim": 32}),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | {"head_dim": 32, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | {"head_dim": 32, "sliding_window": 64}),
    "phi3": ("Phi3Config", LLAMA_LIKE | {"sliding_window": 63, "pad_token_id": 0}),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4}),
    "mistral-window": ("MistralConfig", LLAMA_LIKE | {"sliding_window": 64}),
    "qwen2-window": (
        "Qwen2Config",
        LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
    ),
}


def config_of(name: str) -> Any:
    kind, fields = OTHERS[name]
    return getattr(transformers, kind)(**fields)


def shape_of(fields: dict[str, Any]) -> ModelShape:
    return shape_of_config(fields, Path("config.json"), "model")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_shapes_have_their_published_number_of_weights(name: str) -> None:
    shape = built_in_shape(name)
    assert shape.parameters.total == PUBLISHED[name]
    assert shape.exact


@pytest.mark.parametrize("name", TINY)
def test_weights_of_engine_models_are_the_spec_s(name: str) -> None:
    spec = load_spec(tiny_source(name))
    assert count_parameters(dimensions_of(spec)).total == spec.num_parameters


@pytest.mark.parametrize("name", TINY)
def test_the_tolerant_reader_agrees_with_the_engine_s(name: str) -> None:
    fields = json.loads((tiny_model(name) / "config.json").read_text())
    shape = shape_of(fields)
    expected = shape_of_spec(load_spec(tiny_source(name)), "model")
    assert shape.groups == expected.groups
    assert shape.parameters == expected.parameters
    assert shape.max_position == expected.max_position


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_counted_as_transformers_builds_them(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict())
    assert shape.parameters.total == sum(p.numel() for p in model.parameters())
    assert shape.exact


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window", "phi3", "qwen2-window"])
def test_windows_are_on_the_layers_where_transformers_has_them(name: str) -> None:
    config = config_of(name)
    fields = config.to_dict()
    for given_types in (True, False):
        if not given_types:
            fields.pop("layer_types", None)
        groups = {group.window: group.num_layers for group in shape_of(fields).groups}
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 5
        sliding = sum(kind == "sliding_attention" for kind in kinds)
        expected = {config.sliding_window: sliding, None: 5 - sliding}
        assert groups == {window: count for window, count in expected.items() if count}


def test_gemma_3_has_one_full_layer_in_six() -> None:
    assert built_in_shape("gemma-3-27b").groups == (
        KVGroup(num_layers=10, num_kv_heads=16, head_dim=128),
        KVGroup(num_layers=52, num_kv_heads=16, head_dim=128, window=1024),
    )


def test_a_multimodal_file_s_text_part_is_read_and_said() -> None:
    inner = LLAMA_LIKE | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64}
    shape = shape_of({"model_type": "gemma3", "text_config": inner, "vision_config": {}})
    assert [group.window for group in shape.groups] == [64]  # none of five is the sixth
    assert "text part" in shape.notes[0]


def test_an_unknown_decoder_is_estimated_and_says_so() -> None:
    shape = shape_of(LLAMA_LIKE | {"model_type": "newcomer"})
    assert not shape.exact
    assert any("estimate" in note for note in shape.notes)
    assert shape.groups == (KVGroup(num_layers=5, num_kv_heads=2, head_dim=16),)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": None}, "model_type"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers"),
        ({"layer_types": ["linear_attention"] * 5}, "layer_types"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"layer_types": ["sliding_attention"] * 5}, "sliding_window"),
    ],
)
def test_k_v_that_is_not_known_is_refused_by_its_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        shape_of(LLAMA_LIKE | {"model_type": "newcomer"} | fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"sliding_window": 64, "layer_types": ["full_attention"]}, "layer_types must list 5"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ],
)
def test_broken_files_are_refused_by_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptModelError, match=named):
        shape_of(LLAMA_LIKE | {"model_type": "newcomer"} | fields)


def test_a_folder_wins_over_a_built_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_shape("gpt2").parameters.total == PUBLISHED["gpt2"]
    (tmp_path / "gpt2").symlink_to(tiny_model("qwen3"))
    assert load_shape("gpt2").groups[0].num_layers == 3


def test_a_folder_of_a_family_that_the_engine_lacks_is_planned_and_said(tmp_path: Path) -> None:
    config_of("gemma2").save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path))
    assert [group.window for group in shape.groups] == [None, 64]
    assert "the engine does not run it" in shape.notes[0]


def test_without_a_model_the_default_one_s_shape_is_used() -> None:
    assert load_shape(None) == load_shape("smollm2-135m") == load_shape("smollm2")


@pytest.mark.default_model
def test_the_default_model_s_built_in_shape_is_its_file_s(default_model: ModelSource) -> None:
    built_in, file = load_shape(None), load_shape(str(default_model.path))
    assert (built_in.groups, built_in.parameters) == (file.groups, file.parameters)
    assert built_in.max_position == file.max_position


@pytest.mark.parametrize("name", GGUF_ARCHITECTURES)
def test_gguf_headers_give_the_engine_s_shape(name: str) -> None:
    shape = load_shape(str(tiny_gguf(name)))
    expected = shape_of_spec(load_spec(tiny_source(name)), "model")
    assert (shape.groups, shape.parameters.total) == (expected.groups, expected.parameters.total)


def test_a_gguf_of_another_family_is_counted_by_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "mistral", metadata={"llama.attention.sliding_window": 64})
    with pytest.raises(UnsupportedModelError, match=r"sliding_window is 64.*which layers of llama"):
        load_shape(str(path))
    write_gguf(path, "mistral", metadata={"llama.attn_logit_softcapping": 50.0})
    shape = load_shape(str(path))
    assert shape.parameters.total == load_spec(tiny_source("mistral")).num_parameters
    assert any("attn_logit_softcapping" in note for note in shape.notes)


def test_hub_ids_fetch_the_config_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(tiny_model("qwen2") / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_shape("someone/model").name == "model"
    assert asked == [("someone/model", "config.json")]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such folder"),
        ("no model at all", "built-in shapes are"),
        ("someone/offline", "cannot be reached"),
    ],
)
def test_a_model_that_is_not_there_is_a_clear_error(
    model: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    real = shape_source._hub_config

    def download(repo: str, _: str) -> str:
        if " " in repo:
            raise errors.HFValidationError(repo)
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert shape_source._hub_config is real
    with pytest.raises(ModelNotFoundError, match=says):
        load_shape(model)


# Groups and pages

groups = st.builds(
    KVGroup,
    num_layers=st.integers(1, 40),
    num_kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from([64, 80, 128, 256]),
    window=st.none() | st.integers(1, 300),
)


@given(group=groups, dtype=st.sampled_from(sorted(DTYPE_BYTES)), block=st.integers(1, 64))
def test_a_group_s_bytes_are_the_layout_s(group: KVGroup, dtype: str, block: int) -> None:
    layout = KVLayout(group.num_layers, group.num_kv_heads, group.head_dim, dtype, block)
    assert group.bytes_per_token(dtype) == layout.bytes_per_token
    assert page_layout([group], dtype, block).page_bytes == layout.bytes_per_block


@given(window=st.integers(1, 200), block=st.integers(1, 40), length=st.integers(1, 1000))
def test_a_window_holds_the_blocks_that_it_straddles_at_worst(
    window: int, block: int, length: int
) -> None:
    group = KVGroup(num_layers=1, num_kv_heads=1, head_dim=1, window=window)

    def touched(tokens: int) -> int:  # blocks of the window's slots, by brute force
        return len({slot // block for slot in range(max(0, tokens - window), tokens)})

    worst = max(touched(tokens) for tokens in range(1, 1 + window + 2 * block))
    assert group.most_blocks(block) == worst
    assert group.blocks(length, block) == min(-(-length // block), worst)
    assert group.blocks(length, block) >= touched(length)


@given(several=st.lists(groups, min_size=1, max_size=4), block=st.integers(1, 32))
def test_pages_are_of_equal_bytes_and_fill_every_group_s_block(
    several: list[KVGroup], block: int
) -> None:
    layout = page_layout(several, "bfloat16", block)
    for group, pages in zip(several, layout.pages_per_block, strict=True):
        assert pages * layout.page_bytes == block * group.bytes_per_token("bfloat16")
    assert layout.bytes_per_token == sum(g.bytes_per_token("bfloat16") for g in several)


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1), (32, 1)])
def test_devices_share_the_heads_and_copy_where_there_are_too_few(tp: int, heads: int) -> None:
    (group,) = built_in_shape("llama-3.1-8b").groups
    assert group.bytes_per_token("fp8", tp) == 2 * 32 * heads * 128
