"""GGUF: the same weights as the folder they were converted from, and every way to be broken."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pagelab.errors import (
    CorruptModelError,
    ModelNotFoundError,
    PageLabError,
    UnsupportedModelError,
)
from pagelab.models.fetch import ModelSource, resolve
from pagelab.models.gguf_file import GGUFFile
from pagelab.models.gguf_model import llama3_divisors, unpermute
from pagelab.models.hf_export import to_transformers
from pagelab.models.registry import load_spec, load_tokenizer, load_weights
from pagelab.models.spec import RopeScaling
from tests.support.tiny_models import (
    GGUF_ARCHITECTURES,
    tiny_gguf,
    tiny_source,
    write_gguf,
)


def load(path: Path) -> dict[str, torch.Tensor]:
    source = ModelSource("gguf", path, path.stem, str(path))
    return load_weights(source, load_spec(source))


def spec_of(path: Path) -> Any:
    return load_spec(ModelSource("gguf", path, path.stem, str(path)))


@pytest.mark.parametrize("name", GGUF_ARCHITECTURES)
def test_float32_weights_are_the_folder_s_bit_for_bit(name: str) -> None:
    folder = tiny_source(name)
    expected = load_weights(folder, load_spec(folder))
    weights = load(tiny_gguf(name))
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(weights[key], tensor), key
        assert weights[key].is_contiguous()


@pytest.mark.parametrize("name", GGUF_ARCHITECTURES)
def test_transformers_computes_the_same_from_both(name: str) -> None:
    folder, file = tiny_source(name), resolve(tiny_gguf(name))
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        theirs = to_transformers(folder, load_spec(folder))(ids).logits
        ours = to_transformers(file, load_spec(file))(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_quantized_weights_are_what_gguf_dequantizes(name: str, quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization]
    folder = tiny_source(name)
    original = load_weights(folder, load_spec(folder))
    for key, tensor in load(tiny_gguf(name, quantization)).items():
        values = original[key].numpy()
        if values.ndim == 2:
            flipped = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            rows = np.ascontiguousarray(values.T) if flipped else values
            rows = gguf.dequantize(gguf.quantize(rows, kind), kind)
            values = rows.T if flipped else rows
        np.testing.assert_array_equal(tensor.float().numpy(), values, err_msg=key)
        if quantization == "F16" and values.ndim == 2:
            assert tensor.dtype is torch.float16


def test_unpermute_puts_the_halves_of_a_head_back() -> None:
    # two heads of four rows: llama.cpp has the rows 0 and 2, then 1 and 3, of each
    rows = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None] * np.ones((1, 3))
    np.testing.assert_array_equal(unpermute(rows, 2)[:, 0], np.arange(8))
    np.testing.assert_array_equal(unpermute(rows[:, 0], 2), np.arange(8))  # biases too


def test_one_dequantization_does_not_depend_on_how_rows_are_grouped() -> None:
    values = np.random.default_rng(0).normal(size=(977, 96)).astype(np.float32)  # a prime number
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tiny_gguf("llama").parent / "rows.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(gguf.quantize(values, kind), kind)
    np.testing.assert_array_equal(GGUFFile(path).read("x"), expected)


def test_metadata_is_what_gguf_s_own_reader_reads() -> None:
    path = tiny_gguf("qwen2")
    ours = GGUFFile(path)
    theirs = gguf.GGUFReader(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == {key: field.contents() for key, field in fields.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))


def with_metadata(tmp_path: Path, name: str = "llama", **metadata: Any) -> Path:
    """A GGUF with keys of its architecture changed; `__` stands for a dot."""
    path = tmp_path / "changed.gguf"
    prefix = GGUF_ARCHITECTURES[name]
    keys = {f"{prefix}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    write_gguf(path, name, metadata=keys)
    return path


def with_tensors(
    tmp_path: Path, tensors: dict[str, npt.NDArray[Any] | None], name: str = "llama"
) -> Path:
    path = tmp_path / "changed.gguf"
    write_gguf(path, name, tensors=tensors)
    return path


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_s_divisors_are_recognized(tmp_path: Path, factor: float) -> None:
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    divisors = llama3_divisors(scaling, 500000.0, 16).astype(np.float32)
    assert divisors.min() == 1
    assert divisors.max() == factor
    path = tmp_path / "llama3.gguf"
    write_gguf(
        path,
        "llama",
        metadata={"llama.rope.freq_base": 500000.0},
        tensors={"rope_freqs.weight": divisors},
    )
    assert spec_of(path).rope_scaling == scaling
    assert load(path).keys() == load(tiny_gguf("llama")).keys()


def test_divisors_agree_with_the_frequencies_that_transformers_scales() -> None:
    source = tiny_source("llama3")
    spec = load_spec(source)
    assert spec.rope_scaling is not None
    scaled = to_transformers(source, spec).model.rotary_emb.inv_freq.double().numpy()
    plain = spec.rope_theta ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    divisors = llama3_divisors(spec.rope_scaling, spec.rope_theta, spec.head_dim)
    np.testing.assert_allclose(plain / divisors, scaled, rtol=1e-6)


def test_divisors_of_one_scale_nothing_and_others_are_refused(tmp_path: Path) -> None:
    ones = np.ones(8, np.float32)
    assert spec_of(with_tensors(tmp_path, {"rope_freqs.weight": ones})).rope_scaling is None
    other = np.linspace(1, 8, 8, dtype=np.float32)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight holds divisors"):
        spec_of(with_tensors(tmp_path, {"rope_freqs.weight": other}))
    with pytest.raises(CorruptModelError, match=r"rope_freqs.weight has the shape \[7\]"):
        spec_of(with_tensors(tmp_path, {"rope_freqs.weight": ones[:7]}))


def test_an_output_tensor_means_an_untied_head(tmp_path: Path) -> None:
    head = np.random.default_rng(0).normal(size=(264, 64)).astype(np.float32)
    path = with_tensors(tmp_path, {"output.weight": head})
    assert spec_of(path).tied_embeddings is False
    assert load(path)["lm_head.weight"].numpy().tolist() == head.tolist()


def test_equal_values_a_layer_are_one(tmp_path: Path) -> None:
    assert spec_of(with_metadata(tmp_path, feed_forward_length=[96, 96])) == spec_of(
        tiny_gguf("llama")
    )
    with pytest.raises(CorruptModelError, match=r"feed_forward_length is \[96, 128\]"):
        spec_of(with_metadata(tmp_path, feed_forward_length=[96, 128]))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"attention__sliding_window": 100}, "llama.attention.sliding_window is 100"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8"),
        ({"attention__value_length": 32}, "attention.value_length is 32"),
    ],
)
def test_options_that_we_lack_are_named(
    tmp_path: Path, metadata: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_of(with_metadata(tmp_path, **metadata))


def test_a_window_as_long_as_the_model_makes_no_difference(tmp_path: Path) -> None:
    assert spec_of(with_metadata(tmp_path, attention__sliding_window=512)).max_position == 512


def test_other_architectures_and_parts_of_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, "llama", metadata={"general.architecture": "mamba"})
    with pytest.raises(UnsupportedModelError, match=r"general.architecture is 'mamba'"):
        spec_of(path)
    write_gguf(path, "llama", metadata={"split.count": 3})
    with pytest.raises(UnsupportedModelError, match=r"split.count is 3"):
        spec_of(path)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    path = with_tensors(tmp_path, {"blk.1.attn_k.weight": None})
    with pytest.raises(
        CorruptModelError, match=r"lacks the tensor model.layers.1.self_attn.k_proj"
    ):
        load(path)
    path = with_tensors(tmp_path, {"blk.1.attn_k.weight": np.zeros((32, 32), np.float32)})
    with pytest.raises(CorruptModelError, match=r"k_proj.weight .*\[32, 32\].*\[32, 64\]"):
        load(path)
    with pytest.raises(CorruptModelError, match=r"lacks the tensor token_embd.weight"):
        spec_of(with_tensors(tmp_path, {"token_embd.weight": None}))


@pytest.mark.parametrize("name", ["blk.0.attn_sub_norm.weight", "blk.7.attn_q.weight", "odd"])
def test_a_tensor_without_a_place_is_refused(tmp_path: Path, name: str) -> None:
    path = with_tensors(tmp_path, {name: np.ones(64, np.float32)})
    with pytest.raises(UnsupportedModelError, match=f"no place for the tensor {name}"):
        load(path)


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    path = tmp_path / "i8.gguf"
    write_gguf(path, "llama")
    # I8 has the code 24: its one byte a value fits into the four of F32
    raw = path.read_bytes()
    key = b"blk.0.ffn_up.weight"
    at = raw.index(key) + len(key) + 4 + 2 * 8
    assert struct.unpack_from("<I", raw, at) == (0,)
    path.write_bytes(raw[:at] + struct.pack("<I", 24) + raw[at + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"ffn_up.weight has the type I8"):
        load(path)
    path.write_bytes(raw[:at] + struct.pack("<I", 999) + raw[at + 4 :])
    with pytest.raises(UnsupportedModelError, match="tensor type 999"):
        load(path)


@pytest.mark.parametrize("keep", [0, 3, 4, 10, 23, 24, 60, 500, 3000, 6000, 7500, -200, -1])
def test_a_truncated_file_is_corrupt(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf("llama", "Q8_0").read_bytes()[:keep])
    with pytest.raises(CorruptModelError, match=r"cut\.gguf"):
        load(path)


def test_other_files_versions_and_byte_orders(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        GGUFFile(path)
    path.write_bytes(bytes(1000))
    with pytest.raises(CorruptModelError, match="does not begin with GGUF"):
        GGUFFile(path)
    raw = tiny_gguf("llama").read_bytes()
    for version, what in ((struct.pack("<I", 1), "version 1"), (struct.pack(">I", 3), "big-endi")):
        path.write_bytes(raw[:4] + version + raw[8:])
        with pytest.raises(UnsupportedModelError, match=what):
            GGUFFile(path)
    path.write_bytes(raw[:4] + struct.pack("<I", 2) + raw[8:])
    assert spec_of(path) == spec_of(tiny_gguf("llama"))


def test_two_tensors_of_one_name_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "twice.gguf"
    raw = tiny_gguf("llama").read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(CorruptModelError, match=r"two tensors named blk.0.ffn_up.weight"):
        GGUFFile(path)


def test_flipped_bytes_in_the_header_raise_our_errors_only(tmp_path: Path) -> None:
    raw = tiny_gguf("qwen2", "Q8_0").read_bytes()
    header = GGUFFile(tiny_gguf("qwen2", "Q8_0")).tensors["token_embd.weight"].start
    path = tmp_path / "flipped.gguf"
    source = ModelSource("gguf", path, "flipped", "flipped")
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(raw)
        for _ in range(chance.choice([1, 1, 4])):
            broken[chance.randrange(4, header)] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            load_weights(source, load_spec(source))
            load_tokenizer(source)
        except PageLabError:
            refused += 1
    assert 40 < refused < 400


@pytest.mark.default_model
def test_the_default_model_is_smollm2(default_model: ModelSource) -> None:
    spec = load_spec(default_model)
    assert (spec.architecture, spec.num_layers, spec.num_heads) == ("llama", 30, 9)
    assert (spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (3, 64, 576)
    assert (spec.vocab_size, spec.max_position, spec.rope_theta) == (49152, 8192, 100000.0)
    assert (spec.norm_eps, spec.tied_embeddings, spec.eos_token_ids) == (1e-5, True, (2,))
    assert spec.num_parameters == 134_515_008
    weights = load_weights(default_model, spec)
    assert sum(t.numel() for t in weights.values()) == spec.num_parameters
    assert {t.dtype for t in weights.values()} == {torch.float32}


@pytest.mark.default_model
def test_the_default_model_knows_a_capital(default_model: ModelSource) -> None:
    spec = load_spec(default_model)
    model = to_transformers(default_model, spec)
    tokenizer = load_tokenizer(default_model)
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.apply_chat_template([question])
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    assert tokenizer.decode(out[0, len(prompt) :].tolist()) == "The capital of France is Paris."
