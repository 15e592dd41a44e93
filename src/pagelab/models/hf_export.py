"""transformers' own model with the same weights: for baselines and for parity tests.

transformers reads the default model's GGUF in 25 s; taking our weights takes 1 s. Its
configuration is built from the spec, so the two can differ only where the spec is wrong, which
the tests on folders (where transformers reads its own files) would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pagelab.errors import CorruptModelError, UnsupportedModelError
from pagelab.models.fetch import ModelSource
from pagelab.models.hf_config import CAUSAL_LM
from pagelab.models.registry import load_weights
from pagelab.models.spec import ModelSpec

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_transformers(
    source: ModelSource,
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor] | None = None,
    dtype: str = "float32",
) -> Any:
    """A `transformers` causal language model in eval mode, on the CPU.

    A folder is read by transformers itself; a GGUF (and any model whose weights are given) takes
    `weights`, or reads them. The weights are not copied where the dtype is theirs already.

    Raises:
        ModelError: the files cannot be read, or transformers has no such model.
    """
    torch_dtype = getattr(torch, dtype)
    if source.kind == "folder" and weights is None:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=torch_dtype, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CorruptModelError(f"transformers cannot load {source.path}: {error}") from error
        return model.eval()
    config = to_config(spec)
    return _build(config, weights or load_weights(source, spec), torch_dtype)


def to_config(spec: ModelSpec) -> Any:
    """transformers' configuration of a spec.

    Raises:
        UnsupportedModelError: its class cannot say what the spec says.
    """
    import transformers

    shared = {
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_ids) or None,
    }
    if spec.architecture == "gpt2":
        return transformers.GPT2Config(**shared, **_gpt2_fields(spec))
    fields = shared | _llama_like_fields(spec)
    if spec.architecture == "llama":
        if spec.qkv_bias != spec.output_bias:
            raise UnsupportedModelError(
                "transformers' Llama has biases on all of q, k, v and the output, or on none"
            )
        return transformers.LlamaConfig(
            **fields, attention_bias=spec.qkv_bias, mlp_bias=spec.mlp_bias
        )
    if spec.architecture == "mistral":
        return transformers.MistralConfig(**fields, sliding_window=None)
    if spec.architecture == "qwen2":
        return transformers.Qwen2Config(**fields)
    return transformers.Qwen3Config(**fields, attention_bias=spec.qkv_bias)


def _gpt2_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_positions": spec.max_position,
        "n_embd": spec.hidden_size,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": spec.intermediate_size,
        # GPT-2's own name for it, and its own order of the same operations
        "activation_function": "gelu_new" if spec.activation == "gelu_tanh" else spec.activation,
        "layer_norm_epsilon": spec.norm_eps,
    }


def _llama_like_fields(spec: ModelSpec) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_position,
        }
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": _ACTIVATIONS[spec.activation],
        "rope_parameters": rope,
    }


def _build(config: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A model that takes these tensors; transformers ties them and computes its own buffers."""
    import transformers

    model, report = getattr(transformers, CAUSAL_LM[config.model_type]).from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
    )
    wrong = {name: keys for name, keys in report.items() if keys}
    if wrong:
        raise UnsupportedModelError(f"transformers' {type(model).__name__} disagrees: {wrong}")
    return model.eval()
