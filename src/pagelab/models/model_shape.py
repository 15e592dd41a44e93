"""A model as the planner sees it: what it keeps for a token, what it weighs, how long it goes.

`config.json` is read more widely here than the engine does (`hf_config`): windows, more families,
and any decoder whose fields have the usual names. What cannot be known is refused by its field.

Source of the fields, their defaults and the layers' order: transformers' configuration classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagelab.errors import CorruptModelError, UnsupportedModelError
from pagelab.models.hf_config import Fields
from pagelab.models.kv_geometry import KVGroup
from pagelab.models.parameters import (
    Dimensions,
    ParameterCount,
    count_parameters,
    dimensions_of,
)
from pagelab.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What planning needs of a model.

    Attributes:
        name: short, for tables.
        dimensions: its sizes.
        groups: its layers by what they keep.
        parameters: its weights.
        exact: whether `parameters` is a count, not an estimate.
        max_position: the model's own maximum length.
        notes: what the reader should know, a sentence each.
    """

    name: str
    dimensions: Dimensions
    groups: tuple[KVGroup, ...]
    parameters: ParameterCount
    exact: bool
    max_position: int
    notes: tuple[str, ...] = ()


def shape_of_spec(spec: ModelSpec, name: str) -> ModelShape:
    """The shape of a model that the engine runs: one group, and weights counted exactly."""
    dimensions = dimensions_of(spec)
    return ModelShape(
        name=name,
        dimensions=dimensions,
        groups=(
            KVGroup(
                num_layers=spec.num_layers,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
            ),
        ),
        parameters=count_parameters(dimensions),
        exact=True,
        max_position=spec.max_position,
    )


def shape_of_config(fields: Mapping[str, Any], path: Path, name: str) -> ModelShape:
    """The shape that the fields of a `config.json` describe.

    Args:
        fields: the file's object.
        path: where it lies, for errors.
        name: the model's short name.

    Raises:
        CorruptModelError: a field is missing or impossible.
        UnsupportedModelError: K/V that planning does not know; the field is named.
    """
    notes: list[str] = []
    inner = fields.get("text_config")
    if isinstance(inner, dict):
        notes.append("only the text part is counted: image or audio weights come on top")
        fields = {k: v for k, v in fields.items() if k in _OF_BOTH} | inner
    config = Fields(fields, path)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise config.refuse("model_type", kind, "planning needs the family's name")
    _refuse_other_kv(config)
    family = _FAMILIES.get(kind, _Family(exact=False))
    dimensions = _dimensions(config, kind, family)
    if not family.exact:
        notes.append(
            f"the number of weights is an estimate: {kind} is counted as a Llama-like decoder"
        )
    max_position = _size(config, _MAX_POSITION, _DEFAULT_MAX_POSITION.get(kind))
    if config.get("quantization_config") is not None:
        notes.append("quantization_config is not followed: --dtype says what a weight takes")
    return ModelShape(
        name=name,
        dimensions=dimensions,
        groups=_groups(dimensions, windows(config, kind, dimensions.num_layers, max_position)),
        parameters=count_parameters(dimensions),
        exact=family.exact,
        max_position=max_position,
        notes=tuple(notes),
    )


# Sizes

# other names of a size, transformers' usual one first
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_MAX_POSITION = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

_DEFAULT_MAX_POSITION = {
    "llama": 2048,
    "mistral": 131072,
    "mixtral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "gpt2": 1024,
    "gemma": 8192,
    "gemma2": 8192,
    "gemma3_text": 131072,
    "phi3": 4096,
    "opt": 2048,
}
_DEFAULT_KV_HEADS = {"mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32} | {
    "gemma": 16,
    "gemma2": 4,
    "gemma3_text": 4,
}
_DEFAULT_VOCAB = {"gemma3_text": 262208}  # gemma-3's own files leave these out
_DEFAULT_HEADS = {"gemma3_text": 8}
_DEFAULT_HEAD_DIM = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
_OF_BOTH = ("tie_word_embeddings", "quantization_config", "model_type")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a family's sizes leave open. A name of a flag field, or a value."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    gated_mlp: bool = True
    qk_norm: bool = False
    layernorm: bool = False
    norms_per_layer: int = 2
    more_positions: int | None = None  # rows of learned positions beyond the maximum length
    tied: bool = False  # where the file does not say
    exact: bool = True


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": _Family(),
    "mixtral": _Family(),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
    "gemma": _Family(qkv_bias="attention_bias", output_bias="attention_bias", tied=True),
    "gemma2": _Family(
        qkv_bias="attention_bias", output_bias="attention_bias", norms_per_layer=4, tied=True
    ),
    "gemma3_text": _Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        norms_per_layer=4,
        tied=True,
    ),
    "gpt2": _Family(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        layernorm=True,
        more_positions=0,
        tied=True,
    ),
    "opt": _Family(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        layernorm=True,
        more_positions=2,  # its table begins with two rows of padding
        tied=True,
    ),
}


def _size(config: Fields, names: tuple[str, ...], default: int | None = None) -> int:
    """A positive whole number under the first of its names that the file has."""
    present = next((name for name in names if config.get(name) is not None), names[0])
    return config.size(present, default)


def _dimensions(config: Fields, kind: str, family: _Family) -> Dimensions:
    hidden = _size(config, _HIDDEN)
    heads = _size(config, _HEADS, _DEFAULT_HEADS.get(kind))
    head_dim = _DEFAULT_HEAD_DIM.get(kind, hidden // heads or None)
    experts = _size(config, _EXPERTS, 1)
    inner = _INNER if experts == 1 else ("moe_intermediate_size", *_INNER)
    plain = hidden * 4 if not family.gated_mlp or not family.exact else None

    def flag(value: bool | str) -> bool:
        return config.flag(value) if isinstance(value, str) else value

    dimensions = Dimensions(
        vocab_size=config.size("vocab_size", _DEFAULT_VOCAB.get(kind)),
        hidden_size=hidden,
        intermediate_size=_size(config, inner, plain),
        num_layers=_size(config, _LAYERS),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(config, kind, heads),
        head_dim=config.size("head_dim", head_dim),
        gated_mlp=family.gated_mlp,
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        tied_embeddings=config.flag("tie_word_embeddings", family.tied),
        layernorm=family.layernorm,
        norms_per_layer=family.norms_per_layer,
        num_experts=experts,
        experts_per_token=min(experts, config.size("num_experts_per_tok", 1)),
    )
    if dimensions.num_heads % dimensions.num_kv_heads:
        raise CorruptModelError(
            f"{config.path}: {heads} attention heads cannot share "
            f"{dimensions.num_kv_heads} K/V heads (num_key_value_heads)"
        )
    if family.more_positions is not None:
        rows = _size(config, _MAX_POSITION, _DEFAULT_MAX_POSITION.get(kind))
        dimensions = dataclasses.replace(dimensions, position_rows=rows + family.more_positions)
    return _opt(config, dimensions) if kind == "opt" else dimensions


def _opt(config: Fields, dimensions: Dimensions) -> Dimensions:
    bias = config.flag("enable_bias", True)
    before = config.flag("do_layer_norm_before", True)
    return dataclasses.replace(
        dimensions,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        embedding_width=config.size("word_embed_proj_dim", dimensions.hidden_size),
        final_norm=before and not config.flag("_remove_final_layer_norm"),
    )


def _num_kv_heads(config: Fields, kind: str, heads: int) -> int:
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return 1  # Falcon's first and StarCoder
    absent = not any(name in config.fields for name in _KV_HEADS)
    return _size(config, _KV_HEADS, _DEFAULT_KV_HEADS.get(kind, heads) if absent else heads)


# Windows

_EVERY_LAYER = ("mistral", "mixtral", "phi3", "starcoder2")
# one layer of so many sees everything; it is the last of each round
_ROUNDS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}
_DEFAULT_WINDOW = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096, "gpt_oss": 128}
_KINDS = ("full_attention", "sliding_attention")


def windows(
    config: Fields, kind: str, num_layers: int, max_position: int
) -> tuple[int | None, ...]:
    """Each layer's window; None where it sees everything.

    Raises:
        CorruptModelError: a list of the wrong length, or a window that is no size.
        UnsupportedModelError: it cannot be told which layers have which.
    """
    absent = "sliding_window" not in config.fields
    if not absent and config.get("sliding_window") is None:
        return (None,) * num_layers
    if kind.startswith("qwen") and not config.flag("use_sliding_window"):
        return (None,) * num_layers
    if absent and kind not in _DEFAULT_WINDOW:
        if "sliding_attention" in config.get("layer_types", ()):
            raise config.refuse("sliding_window", None, "layer_types has sliding_attention")
        return (None,) * num_layers
    window = config.size("sliding_window", _DEFAULT_WINDOW.get(kind))
    if window >= max_position:
        return (None,) * num_layers  # as long as the model: it makes no difference
    sliding = _sliding_layers(config, kind, num_layers, window)
    return tuple(window if slides else None for slides in sliding)


def _sliding_layers(config: Fields, kind: str, num_layers: int, window: int) -> list[bool]:
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            raise CorruptModelError(
                f"{config.path}: layer_types must list {num_layers} kinds, one a layer"
            )
        return [name == "sliding_attention" for name in types]
    if kind in _EVERY_LAYER:
        return [True] * num_layers
    if kind.startswith("qwen"):
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise CorruptModelError(f"{config.path}: max_window_layers is {first!r}")
        return [layer >= first for layer in range(num_layers)]
    if kind in _ROUNDS or config.get("sliding_window_pattern") is not None:
        every = config.size("sliding_window_pattern", _ROUNDS.get(kind))
        return [(layer + 1) % every != 0 for layer in range(num_layers)]
    raise config.refuse(
        "sliding_window", window, f"which layers of {kind} use it is not known (layer_types)"
    )


def _groups(d: Dimensions, layers: tuple[int | None, ...]) -> tuple[KVGroup, ...]:
    """Layers with the same window together; those that keep most first."""
    distinct = sorted(set(layers), key=lambda window: (window is not None, -(window or 0)))
    return tuple(
        KVGroup(
            num_layers=layers.count(window),
            num_kv_heads=d.num_kv_heads,
            head_dim=d.head_dim,
            window=window,
        )
        for window in distinct
    )


# Refusals

_OTHER_KV = {
    "is_encoder_decoder": "an encoder's K/V is not planned for",
    "kv_lora_rank": "latent K/V (MLA) is not planned for",
    "attention_chunk_size": "chunked attention is not planned for",
    "num_kv_shared_layers": "K/V shared between layers is not planned for",
    "attn_layer_period": "layers without K/V are not planned for",
    "hybrid_override_pattern": "layers without K/V are not planned for",
    "layers_block_type": "layers without K/V are not planned for",
    "full_attention_interval": "layers without K/V are not planned for",
    "attention_types": "GPT-Neo's local layers are not planned for",
    "global_head_dim": "layers with heads of several sizes are not planned for",
    "block_configs": "layers of several shapes are not planned for",
}


def _refuse_other_kv(config: Fields) -> None:
    """Whatever makes K/V something else than two vectors a head, layer and token.

    Raises:
        UnsupportedModelError: with the field that says so.
    """
    for field, why in _OTHER_KV.items():
        value = config.get(field)
        if value:
            raise config.refuse(field, value, why)
    types = config.get("layer_types", ())
    others = sorted({str(name) for name in types} - set(_KINDS))
    if others:
        raise UnsupportedModelError(
            f"{config.path}: layer_types has {others[0]!r}: planning knows {', '.join(_KINDS)}"
        )
