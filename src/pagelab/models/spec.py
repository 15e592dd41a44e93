"""What a decoder is, as plain data: enough to build it, to count its bytes, and to plan for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pagelab.memory.layout import KVLayout

Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["rope", "learned"]
Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies (long wavelengths are stretched).

    Source: the `rope_type: llama3` rule of Llama 3.1's published configuration.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only transformer.

    Every layer is: norm, attention, residual add, norm, feed-forward, residual add. The
    families differ only in the fields below::

                     positions  norm       mlp       qkv_bias  qk_norm
        Llama, …     rope       rmsnorm    gated     (option)  no
        Qwen2        rope       rmsnorm    gated     yes       no
        Qwen3        rope       rmsnorm    gated     no        yes
        GPT-2        learned    layernorm  plain     yes       no
    """

    architecture: str  # transformers' name of the class family: llama, mistral, qwen2, qwen3, gpt2
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # the model's own maximum length
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    positions: Positions = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False  # attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def kv_layout(self, dtype: str, block_size: int) -> KVLayout:
        """The K/V geometry of this model's (only) group of layers."""
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, dtype, block_size)

    @property
    def num_parameters(self) -> int:
        """Weights, counted once where they are tied (norms and biases included)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, f = self.hidden_size, self.intermediate_size
        norm = h * (2 if self.norm == "layernorm" else 1)
        layer = h * (q + 2 * kv) + q * h + (3 if self.gated_mlp else 2) * h * f + 2 * norm
        layer += (q + 2 * kv) * self.qkv_bias + h * self.output_bias
        layer += (f * (2 if self.gated_mlp else 1) + h) * self.mlp_bias
        layer += 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        if self.positions == "learned":
            embeddings += self.max_position * h
        return self.num_layers * layer + embeddings + norm
