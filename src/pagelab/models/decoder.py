"""One decoder for every family that `ModelSpec` can describe.

It holds weights and nothing else: positions, K/V and the batch come in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch

from pagelab.models.layers import Linear, Norm, RotaryEmbedding, activation, rotate
from pagelab.models.spec import ModelSpec

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`attend(layer, q, k, v)`: writes k and v into the cache and attends; see `attention.base`."""

Weights = MutableMapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer, merged so that a layer takes four products."""

    attention_norm: Norm
    qkv: Linear  # [q heads | k heads | v heads]
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    up: Linear  # [gate | up], or up alone
    down: Linear


class Decoder:
    """token ids `[T]`, positions `[T]` → hidden states `[T, hidden]` → logits.

    Args:
        spec: what to build.
        weights: in transformers' names and shapes (`models.registry.load_weights`). Emptied, so
            that packed and unpacked weights are never both in memory.
        dtype: what to compute in.
        device: where.
        pack: put linear layers into the layout that is fastest here; off, they stay `[out, in]`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        *,
        pack: bool = True,
    ) -> None:
        self.spec = spec
        self.dtype = dtype

        def get(name: str) -> torch.Tensor:  # once each: what is packed is not kept as it was
            return weights.pop(name).to(device=device, dtype=dtype)

        build = _gpt2_layer if spec.architecture == "gpt2" else _llama_layer
        self.layers = [build(spec, get, i, pack) for i in range(spec.num_layers)]
        base = "transformer.wte" if spec.architecture == "gpt2" else "model.embed_tokens"
        self.embedding = get(f"{base}.weight")
        if spec.architecture == "gpt2":
            self.position_embedding = get("transformer.wpe.weight")
            self.final_norm = _norm(spec, get, "transformer.ln_f")
        else:
            self.final_norm = _norm(spec, get, "model.norm")
        head = self.embedding if spec.tied_embeddings else get("lm_head.weight")
        self.head = Linear(head, pack=pack)
        self.rotary = RotaryEmbedding(spec, device) if spec.positions == "rope" else None

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm."""
        spec = self.spec
        x = self.embedding[token_ids]
        table = None
        if self.rotary is not None:
            table = self.rotary.table(positions, self.dtype)
        else:
            x = x + self.position_embedding[positions]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, layer.attention_norm(x), table)
            x = x + layer.output(attend(i, q, k, v).flatten(1))
            hidden = layer.up(layer.mlp_norm(x))
            if spec.gated_mlp:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = activation(spec.activation, gate) * up
            else:
                hidden = activation(spec.activation, hidden)
            x = x + layer.down(hidden)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, vocab]` in float32 for the rows that are sampled."""
        return self.head(self.final_norm(hidden)).float()

    def _qkv(
        self,
        layer: DecoderLayer,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec = self.spec
        heads = layer.qkv(x).view(x.shape[0], -1, spec.head_dim)
        num_q, num_kv = spec.num_heads, spec.num_kv_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = heads.split([num_q, num_kv, num_kv], dim=1)
            qk = torch.cat([layer.q_norm(q), layer.k_norm(k)], dim=1)
        else:
            qk, v = heads.split([num_q + num_kv, num_kv], dim=1)
        if table is not None:
            qk = rotate(qk, *table)
        return qk[:, :num_q], qk[:, num_q:], v


Get = Callable[[str], torch.Tensor]


def _llama_layer(spec: ModelSpec, get: Get, index: int, pack: bool) -> DecoderLayer:
    base = f"model.layers.{index}"
    attention, mlp = f"{base}.self_attn", f"{base}.mlp"
    qkv_names = [f"{attention}.{part}_proj" for part in "qkv"]
    up_names = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
    return DecoderLayer(
        attention_norm=_norm(spec, get, f"{base}.input_layernorm"),
        qkv=_merged(get, qkv_names, spec.qkv_bias, pack),
        q_norm=_norm(spec, get, f"{attention}.q_norm") if spec.qk_norm else None,
        k_norm=_norm(spec, get, f"{attention}.k_norm") if spec.qk_norm else None,
        output=_merged(get, [f"{attention}.o_proj"], spec.output_bias, pack),
        mlp_norm=_norm(spec, get, f"{base}.post_attention_layernorm"),
        up=_merged(get, up_names, spec.mlp_bias, pack),
        down=_merged(get, [f"{mlp}.down_proj"], spec.mlp_bias, pack),
    )


def _gpt2_layer(spec: ModelSpec, get: Get, index: int, pack: bool) -> DecoderLayer:
    base = f"transformer.h.{index}"

    def linear(name: str) -> Linear:  # GPT-2 stores [in, out]
        return Linear(get(f"{base}.{name}.weight").t(), get(f"{base}.{name}.bias"), pack=pack)

    return DecoderLayer(
        attention_norm=_norm(spec, get, f"{base}.ln_1"),
        qkv=linear("attn.c_attn"),
        q_norm=None,
        k_norm=None,
        output=linear("attn.c_proj"),
        mlp_norm=_norm(spec, get, f"{base}.ln_2"),
        up=linear("mlp.c_fc"),
        down=linear("mlp.c_proj"),
    )


def _merged(get: Get, names: list[str], bias: bool, pack: bool) -> Linear:
    """Several linear layers with the same input, as one."""
    weight = torch.cat([get(f"{name}.weight") for name in names])
    biases = torch.cat([get(f"{name}.bias") for name in names]) if bias else None
    return Linear(weight, biases, pack=pack)


def _norm(spec: ModelSpec, get: Get, name: str) -> Norm:
    bias = get(f"{name}.bias") if spec.norm == "layernorm" else None
    return Norm(spec.norm, spec.norm_eps, get(f"{name}.weight"), bias)
