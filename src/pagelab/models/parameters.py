"""How many weights a decoder has, and who holds which of them: counted from its dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes of a decoder, of any family: a `ModelSpec` and what that does not have.

    Attributes beyond `ModelSpec`'s:
        layernorm: norms have a bias beside their weight.
        norms_per_layer: 2, or 4 where attention and feed-forward are normed on their way out too.
        final_norm: whether a norm follows the last layer.
        position_rows: rows of a table of learned positions; 0 without one.
        embedding_width: of the token table, where it is not `hidden_size` (two projections then
            lead in and out).
        num_experts, experts_per_token: feed-forward networks of a layer, and those a token uses.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    layernorm: bool = False
    norms_per_layer: int = 2
    final_norm: bool = True
    position_rows: int = 0
    embedding_width: int | None = None
    num_experts: int = 1
    experts_per_token: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Weights by what happens to them.

    Attributes:
        embedding: the token table (a step looks up a few rows; the head reads it if tied).
        head: the output matrix where it is a tensor of its own, else 0.
        positions: learned positions, looked up too.
        sharded: query, output and feed-forward matrices: split over devices.
        kv: key and value matrices: split by K/V heads, copied where there are too few.
        replicated: norms, biases after a sum, routers: on every device.
        idle: of `sharded`, the experts that one token does not use.
    """

    embedding: int
    head: int
    positions: int
    sharded: int
    kv: int
    replicated: int
    idle: int = 0

    @property
    def total(self) -> int:
        """All weights, each once."""
        return (
            self.embedding + self.head + self.positions + self.sharded + self.kv + self.replicated
        )

    def on_one_device(self, tp: int, num_kv_heads: int) -> int:
        """Weights on the fullest of `tp` devices."""
        tables = -(-(self.embedding + self.head) // tp)
        kv = self.kv * max(1, num_kv_heads // tp) // num_kv_heads
        return tables + self.positions + -(-self.sharded // tp) + kv + self.replicated

    def read_by_a_step(self, tp: int, num_kv_heads: int) -> int:
        """Weights that one device must read to decode, at least.

        Not the tables of which a step takes a few rows (tokens, unless tied to the head, and
        positions), and of experts only those that a single token uses.
        """
        looked_up = self.positions + (-(-self.embedding // tp) if self.head else 0)
        return self.on_one_device(tp, num_kv_heads) - looked_up - self.idle // tp


def dimensions_of(spec: ModelSpec) -> Dimensions:
    """The dimensions of a model that the engine runs."""
    return Dimensions(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        gated_mlp=spec.gated_mlp,
        qkv_bias=spec.qkv_bias,
        output_bias=spec.output_bias,
        mlp_bias=spec.mlp_bias,
        qk_norm=spec.qk_norm,
        tied_embeddings=spec.tied_embeddings,
        layernorm=spec.norm == "layernorm",
        position_rows=spec.max_position if spec.positions == "learned" else 0,
    )


def count_parameters(d: Dimensions) -> ParameterCount:
    """Count a decoder's weights."""
    width = d.hidden_size if d.embedding_width is None else d.embedding_width
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    matrices = 3 if d.gated_mlp else 2
    expert = matrices * d.hidden_size * d.intermediate_size
    expert += (matrices - 1) * d.intermediate_size * d.mlp_bias
    norm = d.hidden_size * (2 if d.layernorm else 1)
    replicated = d.norms_per_layer * norm + 2 * d.head_dim * d.qk_norm
    replicated += d.hidden_size * (d.output_bias + d.num_experts * d.mlp_bias)
    replicated += d.hidden_size * d.num_experts * (d.num_experts > 1)  # the router
    around = d.final_norm * norm + (2 * width * d.hidden_size if width != d.hidden_size else 0)
    return ParameterCount(
        embedding=d.vocab_size * width,
        head=0 if d.tied_embeddings else d.vocab_size * width,
        positions=d.position_rows * d.hidden_size,
        sharded=d.num_layers * (2 * q * d.hidden_size + q * d.qkv_bias + d.num_experts * expert),
        kv=d.num_layers * 2 * kv * (d.hidden_size + d.qkv_bias),
        replicated=d.num_layers * replicated + around,
        idle=d.num_layers * max(0, d.num_experts - d.experts_per_token) * expert,
    )
