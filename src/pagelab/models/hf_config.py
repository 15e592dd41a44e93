"""transformers' `config.json` → `ModelSpec`; what we do not have is refused by name.

Source of the fields and their defaults: transformers' configuration classes. Files written by
transformers 5 hold `rope_parameters`; older ones hold `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models.spec import Activation, ModelSpec, RopeScaling

CAUSAL_LM = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""The architectures, and the class that has each one's language model head."""

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# what a field means where a config.json leaves it out
_MAX_POSITION = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_BOS = {"llama": 1, "mistral": 1, "gpt2": 50256}
_EOS = {"llama": 2, "mistral": 2, "gpt2": 50256}
_MISTRAL_WINDOW = 4096


class Fields:
    """A config file's fields, checked as they are taken.

    Raises (from all methods):
        CorruptModelError: a field is missing or of the wrong type.
        UnsupportedModelError: an option that PageLab does not have.
    """

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.fields, self.path = fields, path

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "is missing" if value is None else f"is {value!r}"
            raise CorruptModelError(f"{self.path}: {name} {what}; it must be a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            what = "is missing" if value is None else f"is {value!r}"
            raise CorruptModelError(f"{self.path}: {name} {what}; it must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CorruptModelError(f"{self.path}: {name} is {value!r}; it must be true or false")
        return value

    def refuse(self, name: str, value: object, why: str) -> UnsupportedModelError:
        """The error for an option that we do not have."""
        return UnsupportedModelError(f"{self.path}: {name} is {value!r}: {why}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ModelNotFoundError: it cannot be read; CorruptModelError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CorruptModelError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CorruptModelError(f"{path} holds no JSON object")
    return content


def read_config(folder: Path) -> ModelSpec:
    """The spec of a model folder.

    Raises:
        ModelNotFoundError, CorruptModelError: config.json is not there, or broken.
        UnsupportedModelError: an architecture or an option that PageLab does not have.
    """
    path = folder / "config.json"
    return spec_of_config(read_json(path), path)


def spec_of_config(fields: Mapping[str, Any], path: Path) -> ModelSpec:
    """The spec that the fields of a `config.json` describe.

    Args:
        fields: the file's object.
        path: where it lies, for errors; generation_config.json is looked for beside it.

    Raises:
        CorruptModelError, UnsupportedModelError: as `read_config`.
    """
    config, folder = Fields(fields, path), path.parent
    kind = config.get("model_type")
    if kind not in CAUSAL_LM:
        raise config.refuse("model_type", kind, f"PageLab has {', '.join(CAUSAL_LM)}")
    names = config.get("architectures", [CAUSAL_LM[kind]])
    if CAUSAL_LM[kind] not in names:
        raise config.refuse("architectures", names, f"PageLab runs {CAUSAL_LM[kind]}")
    if config.get("quantization_config") is not None:
        method = dict(config.get("quantization_config")).get("quant_method", "unknown")
        raise config.refuse("quantization_config", method, "give a full-precision model or a GGUF")
    return _gpt2(config, folder) if kind == "gpt2" else _llama_like(config, kind, folder)


def eos_token_ids(config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """Every id that ends a sequence: generation_config.json's, then config.json's."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    config = {"eos_token_id": _EOS.get(config.get("model_type", ""))} | dict(config)
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise CorruptModelError(f"{folder}: eos_token_id must be token ids, not {ids}")
    return tuple(dict.fromkeys(ids))


def _llama_like(config: Fields, kind: str, folder: Path) -> ModelSpec:
    heads = config.size("num_attention_heads")
    hidden = config.size("hidden_size")
    layers = config.size("num_hidden_layers")
    max_position = config.size("max_position_embeddings", _MAX_POSITION[kind])
    _refuse_windows(config, kind, max_position)
    theta, scaling = _rope(config, max_position)
    # Mistral and Qwen2 have no such option; Qwen2's q, k and v always have a bias
    bias = kind in ("llama", "qwen3") and config.flag("attention_bias")
    spec = ModelSpec(
        architecture=kind,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(config, kind, heads),
        head_dim=config.size("head_dim", 128 if kind == "qwen3" else hidden // heads or None),
        max_position=max_position,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_activation(config, "hidden_act", "silu"),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=kind == "llama" and config.flag("mlp_bias"),
        qk_norm=kind == "qwen3",
        tied_embeddings=config.flag("tie_word_embeddings"),
        bos_token_id=_bos(config, kind),
        eos_token_ids=eos_token_ids(config.fields, folder),
    )
    return check_heads(spec, config.path)


def _gpt2(config: Fields, folder: Path) -> ModelSpec:
    for name, ours in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if config.flag(name, ours) is not ours:
            raise config.refuse(name, not ours, "PageLab has plain GPT-2 attention only")
    hidden, heads = config.size("n_embd"), config.size("n_head")
    spec = ModelSpec(
        architecture="gpt2",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("n_inner", 4 * hidden),
        num_layers=config.size("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.size("head_dim", hidden // heads or None),
        max_position=config.size("n_positions", 1024),
        norm="layernorm",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=_activation(config, "activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        bos_token_id=_bos(config, "gpt2"),
        eos_token_ids=eos_token_ids(config.fields, folder),
    )
    if spec.head_dim * heads != hidden:
        raise CorruptModelError(
            f"{config.path}: n_embd {hidden} is not n_head {heads} times a size"
        )
    return check_heads(spec, config.path)


def check_heads(spec: ModelSpec, where: Path) -> ModelSpec:
    """The spec itself, if its heads can be grouped and turned.

    Raises:
        CorruptModelError: they cannot.
    """
    if spec.num_heads % spec.num_kv_heads:
        raise CorruptModelError(
            f"{where}: {spec.num_heads} attention heads cannot share {spec.num_kv_heads} K/V heads"
        )
    if spec.positions == "rope" and spec.head_dim % 2:
        raise CorruptModelError(f"{where}: rotary positions need an even head_dim")
    return spec


def _kv_heads(config: Fields, kind: str, heads: int) -> int:
    # null means as many as heads; only an absent field means the family's default
    absent = "num_key_value_heads" not in config.fields
    return config.size("num_key_value_heads", _KV_HEADS.get(kind, heads) if absent else heads)


def _bos(config: Fields, kind: str) -> int | None:
    value = config.fields.get("bos_token_id", _BOS.get(kind))
    if value is not None and not isinstance(value, int):
        raise CorruptModelError(f"{config.path}: bos_token_id must be a token id, not {value!r}")
    return value


def _activation(config: Fields, name: str, default: str) -> Activation:
    value = config.get(name, default)
    if value not in ACTIVATIONS:
        raise config.refuse(name, value, f"PageLab has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _refuse_windows(config: Fields, kind: str, max_position: int) -> None:
    """Sliding windows that would be used; one as long as the model makes no difference."""
    why = "PageLab has full attention only"
    if kind == "mistral":
        window = config.fields.get("sliding_window", _MISTRAL_WINDOW)
        if window is not None and window < max_position:
            raise config.refuse("sliding_window", window, why)
    if kind in ("qwen2", "qwen3") and config.flag("use_sliding_window"):
        raise config.refuse("use_sliding_window", True, why)
    other = {str(layer) for layer in config.get("layer_types", ())} - {"full_attention"}
    if other:
        raise config.refuse("layer_types", sorted(other)[0], why)


def _rope(config: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from the new field or the two old ones."""
    new = config.fields.get("rope_parameters")
    name = "rope_scaling" if new is None else "rope_parameters"
    parameters = config.get(name, {})
    if not isinstance(parameters, dict):
        raise CorruptModelError(f"{config.path}: {name} is {parameters!r}; it must be an object")
    rope = Fields({"rope_theta": config.get("rope_theta")} | parameters, config.path)
    theta = rope.number("rope_theta", 10000.0)
    for fields in (rope, config):
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            value = fields.get("partial_rotary_factor")
            raise config.refuse("partial_rotary_factor", value, "PageLab turns whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise config.refuse(f"{name}.rope_type", kind, "PageLab has default and llama3")
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.size("original_max_position_embeddings", max_position),
    )
