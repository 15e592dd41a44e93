"""Weights from safetensors: the same tensors, and every way in which a file can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models.fetch import resolve
from pagelab.models.hf_export import to_transformers
from pagelab.models.registry import expected_weights, load_spec, load_weights
from tests.support.tiny_models import TINY, tiny_model, tiny_source


def copied(name: str, folder: Path, *, sharded: bool = False) -> Path:
    return Path(shutil.copytree(tiny_model(name, sharded=sharded), folder / "model"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    source = resolve(folder)
    return load_weights(source, load_spec(source))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_weights_are_transformers_own(name: str, sharded: bool) -> None:
    source = tiny_source(name, sharded=sharded)
    assert (source.path / "model.safetensors.index.json").exists() is sharded
    spec = load_spec(source)
    weights = load_weights(source, spec)
    theirs = to_transformers(source, spec).state_dict()
    assert {name: tuple(t.shape) for name, t in weights.items()} == expected_weights(spec)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_a_model_around_our_weights_computes_what_the_folder_s_does(name: str) -> None:
    source = tiny_source(name)
    spec = load_spec(source)
    theirs = to_transformers(source, spec)
    ours = to_transformers(source, spec, load_weights(source, spec))
    ids = torch.arange(1, 100)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert not ours.training
    half = to_transformers(source, spec, load_weights(source, spec), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_gpt2_files_without_the_prefix_and_with_buffers_are_the_same(tmp_path: Path) -> None:
    folder = copied("gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the causal mask of old files
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, folder / "model.safetensors")
    weights = load(folder)
    assert weights.keys() == load(tiny_model("gpt2")).keys()
    assert torch.equal(weights["transformer.wte.weight"], tensors["transformer.wte.weight"])


def test_a_tied_head_in_the_file_is_left_there(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight" not in load(folder)


def test_weights_keep_the_dtype_of_the_file(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")
    assert {t.dtype for t in load(folder).values()} == {torch.bfloat16}
    save_file({n: t.to(torch.int32) for n, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="stored as I32"):
        load(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = copied("qwen3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptModelError, match=r"lacks the tensor model.layers.1.self_attn.q_no"):
        load(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CorruptModelError, match=r"and 35 more"):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(63)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptModelError, match=r"model.norm.weight .*\[63\].*\[64\]"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_corrupt(tmp_path: Path, keep: int) -> None:
    folder = copied("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptModelError, match=r"model.safetensors is no whole safetensors"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path, sharded=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(CorruptModelError, match=f"lacks the shard {shards[1].name}"):
        load(folder)


def test_an_index_must_be_there_and_whole(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path, sharded=True)
    index = folder / "model.safetensors.index.json"
    for text in ("{}", json.dumps({"weight_map": [1]}), json.dumps({"weight_map": {"a": 1}})):
        index.write_text(text)
        with pytest.raises(CorruptModelError, match="no weight_map"):
            load(folder)
    index.unlink()
    with pytest.raises(CorruptModelError, match=r"no model\.safetensors\.index\.json"):
        load(folder)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "only.safetensors")
    assert load(folder)  # a single file may have any name
    (folder / "only.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors"):
        load(folder)
