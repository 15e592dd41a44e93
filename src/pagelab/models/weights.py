"""Which tensors a model has: names, shapes, and the check that a file holds them all.

The names are transformers' own, so that a folder's tensors need no renaming and transformers'
models can take ours (`hf_export`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pagelab.errors import CorruptModelError
from pagelab.models.spec import ModelSpec

Shape = tuple[int, ...]


def expected_weights(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of a model by transformers' name, with its shape.

    Linear weights are `[out, in]`, except GPT-2's, which are `[in, out]` (transformers' Conv1D).
    `lm_head.weight` is there only where it is not the embedding itself.
    """
    shapes = _gpt2(spec) if spec.architecture == "gpt2" else _llama_like(spec)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def check_shapes(found: Mapping[str, Shape], spec: ModelSpec, where: Path) -> None:
    """Compare what a file holds with what the spec needs; more than that is not looked at.

    Raises:
        CorruptModelError: a tensor is missing or has another shape; names the first, counts all.
    """
    expected = expected_weights(spec)
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptModelError(f"{where} lacks the tensor {missing[0]}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CorruptModelError(
                f"{where}: {name} has the shape {list(found[name])}, "
                f"but the model's configuration needs {list(shape)}"
            )


def _llama_like(spec: ModelSpec) -> dict[str, Shape]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = {  # name: (out, in, bias)
        "self_attn.q_proj": (q, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q, spec.output_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(spec.num_layers):
        base = f"model.layers.{index}"
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{base}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{base}.{name}.bias"] = (rows,)
        shapes |= {f"{base}.{name}.weight": (size,) for name, size in norms.items()}
    return shapes


def _gpt2(spec: ModelSpec) -> dict[str, Shape]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    linears = {  # name: (in, out)
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    shapes: dict[str, Shape] = {
        "transformer.wte.weight": (spec.vocab_size, hidden),
        "transformer.wpe.weight": (spec.max_position, hidden),
    }
    norms = ["transformer.ln_f"]
    for index in range(spec.num_layers):
        base = f"transformer.h.{index}"
        norms += [f"{base}.ln_1", f"{base}.ln_2"]
        for name, shape in linears.items():
            shapes[f"{base}.{name}.weight"] = shape
            shapes[f"{base}.{name}.bias"] = shape[1:]
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return shapes
