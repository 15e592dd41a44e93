"""A GGUF file's model: metadata → `ModelSpec`, llama.cpp's tensors → transformers'.

llama.cpp stores three things its own way, and all are undone here:

* architecture `llama` (Mistral too) has the rows of q and k in pairs, `0 D/2 1 D/2+1 …`, for its
  rotary kernel; transformers turns the two halves of a head. Qwen's are not permuted.
* GPT-2's linear weights are `[out, in]`; transformers keeps them `[in, out]`.
* Llama 3's scaling of the rotary frequencies is a tensor of divisors, `rope_freqs.weight`.

Source: llama.cpp, `convert_hf_to_gguf.py` and `gguf-py/gguf/tensor_mapping.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

from pagelab.errors import CorruptModelError, UnsupportedModelError
from pagelab.models.gguf_file import GGUFFile
from pagelab.models.hf_config import Fields, check_heads
from pagelab.models.spec import ModelSpec, RopeScaling
from pagelab.models.weights import check_shapes, expected_weights

if TYPE_CHECKING:
    from pagelab.native.packed import Blocks

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_BLOCK_TYPES = tuple(gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))
_ROPE_FACTORS = "rope_freqs.weight"
# options that change the arithmetic, and the value at which they do not
_NEUTRAL: Mapping[str, Any] = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "final_logit_softcapping": 0.0,
    "attn_logit_softcapping": 0.0,
}
# Llama 3.1 to 3.3 differ only in the factor; the divisors do not tell these three
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


def read_spec(file: GGUFFile) -> ModelSpec:
    """The spec that a file's metadata describes.

    Raises:
        CorruptModelError: metadata that is missing or impossible.
        UnsupportedModelError: an architecture or an option that PageLab does not have.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: general.architecture is {kind!r}: "
            f"PageLab has {', '.join(_ARCHITECTURES)}"
        )
    own = {
        key.removeprefix(f"{kind}."): _same_in_all_layers(value)
        for key, value in file.metadata.items()
        if key.startswith(f"{kind}.")
    }
    config = Fields(own, file.path)
    context = config.size("context_length")
    for name, neutral in _NEUTRAL.items():
        value = config.get(name, neutral)
        if name == "attention.sliding_window" and isinstance(value, int) and value >= context:
            continue  # never used
        if value != neutral:
            raise config.refuse(f"{kind}.{name}", value, "PageLab does not have this option")
    has = file.tensors.keys()
    spec = ModelSpec(
        architecture=kind,
        vocab_size=_vocab_size(file),
        hidden_size=config.size("embedding_length"),
        intermediate_size=config.size("feed_forward_length"),
        num_layers=config.size("block_count"),
        num_heads=(heads := config.size("attention.head_count")),
        num_kv_heads=config.size("attention.head_count_kv", heads),
        head_dim=_head_dim(config, heads),
        max_position=context,
        tied_embeddings="output.weight" not in has,
        bos_token_id=_token_id(file.metadata, "bos"),
        eos_token_ids=eos_token_ids(file.metadata),
        **(_gpt2(config) if kind == "gpt2" else _llama_like(file, config, kind)),
    )
    return check_heads(spec, file.path)


def read_arrays(file: GGUFFile, spec: ModelSpec) -> dict[str, npt.NDArray[Any]]:
    """All weights in transformers' names and layout.

    Raises:
        CorruptModelError: a tensor is missing or has another shape.
        UnsupportedModelError: a tensor that the spec has no place for, or that cannot be read.
    """
    places = stored_names(file, spec)
    return {name: read_array(file, spec, name, stored) for name, stored in places.items()}


def stored_names(file: GGUFFile, spec: ModelSpec) -> dict[str, str]:
    """The file's name of each of `expected_weights(spec)`, all of them checked.

    Raises:
        CorruptModelError: a tensor is missing or has another shape.
        UnsupportedModelError: a tensor that the spec has no place for.
    """
    names = {gguf_name: transformers_name(gguf_name, spec) for gguf_name in file.tensors}
    expected = expected_weights(spec)
    for gguf_name, name in names.items():
        if name not in expected and gguf_name != _ROPE_FACTORS:
            raise UnsupportedModelError(
                f"{file.path}: {spec.architecture} has no place for the tensor {gguf_name}"
            )
    stored = {name: file.tensors[gguf_name].shape for gguf_name, name in names.items() if name}
    flipped = {n: s[::-1] if _is_conv1d(n) else s for n, s in stored.items()}
    check_shapes(flipped, spec, file.path)
    return {name: stored for stored, name in names.items() if name in expected and name is not None}


def read_array(file: GGUFFile, spec: ModelSpec, name: str, stored_name: str) -> npt.NDArray[Any]:
    """One weight by transformers' name, in transformers' layout.

    Raises:
        UnsupportedModelError: a type that cannot be dequantized.
    """
    values = file.read(stored_name)
    if _is_conv1d(name):
        return np.ascontiguousarray(values.T)
    return _in_transformers_order(values, spec, name)


def read_blocks(file: GGUFFile, spec: ModelSpec, name: str, stored_name: str) -> Blocks | None:
    """One matrix `[out, in]` as the file's quantized blocks, its rows in transformers' order.

    None where its type is none of `_BLOCK_TYPES`, or transformers keeps it `[in, out]`.
    """
    from pagelab.native.packed import Blocks  # which imports torch

    tensor = file.tensors[stored_name]
    if tensor.type not in _BLOCK_TYPES or len(tensor.shape) != 2 or _is_conv1d(name):
        return None
    rows = _in_transformers_order(file.raw(stored_name), spec, name)
    return Blocks(int(tensor.type), rows, tensor.shape[1])


def _in_transformers_order(rows: npt.NDArray[Any], spec: ModelSpec, name: str) -> npt.NDArray[Any]:
    if spec.architecture == "llama" and ".q_proj." in name:
        return unpermute(rows, spec.num_heads)
    if spec.architecture == "llama" and ".k_proj." in name:
        return unpermute(rows, spec.num_kv_heads)
    return rows


def transformers_name(name: str, spec: ModelSpec) -> str | None:
    """transformers' name of a llama.cpp tensor; None where there is none."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, part, end = match.groups()
    names, base = (
        (_GPT2_NAMES, "transformer.h")
        if spec.architecture == "gpt2"
        else (_LLAMA_NAMES, "model.layers")
    )
    if part not in names:
        return None
    return f"{names[part]}.{end}" if layer is None else f"{base}.{layer}.{names[part]}.{end}"


def unpermute(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of q or k from llama.cpp's order back to transformers'.

    ::

        a head's rows in the file   0  D/2  1  D/2+1  2  …
        and in transformers         0  1  2  …  | D/2  D/2+1  …
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, a turn or a message."""
    ids = [_token_id(metadata, name) for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) else None


def _gpt2(config: Fields) -> dict[str, Any]:
    return {
        "norm": "layernorm",
        "norm_eps": _float32(config.number("attention.layer_norm_epsilon", 1e-5)),
        "positions": "learned",
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }


def _llama_like(file: GGUFFile, config: Fields, kind: str) -> dict[str, Any]:
    scaling = config.get("rope.scaling.type", "none")
    if scaling != "none":
        raise config.refuse(f"{kind}.rope.scaling.type", scaling, "PageLab has none and llama3's")
    has = file.tensors.keys()
    return {
        "norm_eps": _float32(config.number("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": config.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, config, kind),
        # where a family has no such option, a bias is a tensor without a place
        "qkv_bias": kind == "qwen2" or "blk.0.attn_q.bias" in has,
        "output_bias": kind != "qwen2" and "blk.0.attn_output.bias" in has,
        "mlp_bias": kind == "llama" and "blk.0.ffn_up.bias" in has,
        "qk_norm": kind == "qwen3",
    }


def _rope_scaling(file: GGUFFile, config: Fields, kind: str) -> RopeScaling | None:
    """Llama 3's scaling, recognized by its divisors.

    Raises:
        UnsupportedModelError: divisors that no published Llama 3 has.
    """
    if _ROPE_FACTORS not in file.tensors:
        return None
    size = _head_dim(config, config.size("attention.head_count"))
    if file.tensors[_ROPE_FACTORS].shape != (size // 2,):
        shape = list(file.tensors[_ROPE_FACTORS].shape)
        raise CorruptModelError(f"{file.path}: {_ROPE_FACTORS} has the shape {shape}")
    divisors = file.read(_ROPE_FACTORS).astype(np.float64)
    if (divisors == 1).all():
        return None
    scaling = RopeScaling(factor=float(divisors.max()), **_LLAMA3)  # type: ignore[arg-type]
    ours = llama3_divisors(scaling, config.number("rope.freq_base", 10000.0), size)
    if not np.allclose(divisors, ours, rtol=1e-5):
        raise UnsupportedModelError(
            f"{file.path}: {_ROPE_FACTORS} holds divisors of rotary frequencies that are not "
            f"Llama 3's (architecture {kind}, largest {divisors.max():g})"
        )
    return scaling


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> npt.NDArray[Any]:
    """What llama.cpp divides each of the `head_dim / 2` rotary frequencies by, for a scaling.

    As in llama.cpp's converter: one for wavelengths below `original / high_freq_factor`, the
    factor above `original / low_freq_factor`, and between them a mean of the two frequencies.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = ((turns - scaling.low_freq_factor) / span).clip(0.0, 1.0)
    divisors: npt.NDArray[Any] = 1 / ((1 - smooth) / scaling.factor + smooth)
    return divisors


def _head_dim(config: Fields, heads: int) -> int:
    size = config.size("attention.key_length", config.size("embedding_length") // heads or None)
    for name in ("attention.value_length", "rope.dimension_count"):
        if config.size(name, size) != size:
            raise config.refuse(name, config.get(name), f"PageLab needs {size}, as for keys")
    return size


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding: the metadata may count fewer, without padding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CorruptModelError(f"{file.path} lacks the tensor token_embd.weight")
    return embedding.shape[0]


def _same_in_all_layers(value: Any) -> Any:
    """llama.cpp may write one value a layer; equal ones are one (others are refused by `size`)."""
    return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value


def _float32(value: float) -> float:
    """1e-5 that was stored as float32 reads 9.999999747378752e-06: give back the short one."""
    return float(f"{value:.6g}")


def _is_conv1d(name: str) -> bool:
    """Whether transformers keeps this weight as [in, out]."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
