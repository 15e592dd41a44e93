"""What each part of the compiled extension's steps must move and compute, counted from shapes.

For T new tokens in a step, of a model with L layers, h hidden, q and kv numbers of all query and
K/V heads, `up` outputs of the first products of the feed-forward part::

    part         bytes                                          operations
    embed        a row of the table, x                 T        none (a sum with learned positions)
    norm         x, the row as a product takes it    2 L T      4 h (LayerNorm 7 h)      2 L T
    linear       all matrices once a step; rows, results        2 x weights              T
    place        q, k, v; K and V as they are kept     L T      turning, scaling         L T
    attention    K/V of each sequence once a step; q, result    4 q a query and key      L
    activation   gate, up; the row of the product      L T      inner (2 with a gate)    L T
    head         the table once a step; its rows                2 h vocab a sampled row

Each number is counted once where it is read or written, whatever caches hold it: a part whose
bytes stay in a cache may go beyond the memory's bandwidth. The softmax's exponentials, dequantizing
and quantizing are not counted as operations, logits that are stored not as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pagelab.models.spec import ModelSpec
from pagelab.native.structures import BF16, F32

if TYPE_CHECKING:
    from pagelab.execution.native_runner import NativeRunner, Work


class NativePart(NamedTuple):
    """A part of the profiled steps: its own time, and what it had to do."""

    name: str
    seconds: float
    bytes: int
    operations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a packed model, beside its spec.

    Attributes:
        layers: of all layers' matrices.
        table, head: of the embedding, and of what the head is multiplied by.
        kind: of the matrices (`native.structures`), and
        table_kind: of the tables: what rows of a product are made into.
        kv_head: of one token's K (or V) of one head.
    """

    layers: int
    table: int
    head: int
    kind: int
    table_kind: int
    kv_head: int


def sizes_of(runner: NativeRunner) -> Sizes:
    """The sizes of a runner's model and cache."""
    decoder = runner.decoder
    table, head = decoder.embedding, decoder.head
    tables = table.nbytes if head is table else table.nbytes + head.nbytes
    return Sizes(
        layers=decoder.weight_bytes - tables,
        table=table.nbytes,
        head=head.nbytes,
        kind=decoder.kind,
        table_kind=int(head.fields.kind),
        kv_head=runner.cache.layout.head_bytes,
    )


def count_parts(spec: ModelSpec, sizes: Sizes, work: Work) -> dict[str, tuple[int, int]]:
    """(bytes, operations) of each part; see the module."""
    h, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    up = inner * (2 if spec.gated_mlp else 1)
    tokens, layers = work.tokens, spec.num_layers * work.tokens
    rope, layernorm = spec.positions == "rope", spec.norm == "layernorm"
    norm_weights = 4 * h * (2 if layernorm else 1)
    kind = sizes.kind
    row = row_bytes(h, kind)
    inputs = 2 * row + row_bytes(q, kind) + row_bytes(inner, kind)
    results = 4 * (q + 2 * kv + up) + 16 * h  # two products are added to x: read and written
    weights = h * (q + 2 * kv) + q * h + h * up + inner * h
    turned = q + kv
    place_operations = 3 * turned * rope + q + 4 * turned * spec.qk_norm
    table_row = sizes.table // spec.vocab_size
    return {
        "embed": (
            tokens * (table_row + 4 * h + (4 * dim if rope else 4 * h)),
            0 if rope else tokens * h,
        ),
        "norm": (
            2 * layers * (4 * h + row) + 2 * spec.num_layers * work.steps * norm_weights,
            2 * layers * h * (7 if layernorm else 4),
        ),
        "linear": (work.steps * sizes.layers + layers * (inputs + results), 2 * layers * weights),
        "place": (
            layers * (8 * turned + 4 * kv + 2 * spec.num_kv_heads * sizes.kv_head),
            layers * place_operations,
        ),
        "attention": (
            spec.num_layers * work.keys * 2 * spec.num_kv_heads * sizes.kv_head
            + layers * (12 * q + row_bytes(q, kind)),
            spec.num_layers * work.pairs * 4 * q,
        ),
        "activation": (
            layers * (4 * up + row_bytes(inner, kind)),
            layers * inner * (2 if spec.gated_mlp else 1),
        ),
        "head": (
            work.head_steps * sizes.head + work.sampled * (4 * h + row_bytes(h, sizes.table_kind)),
            2 * work.sampled * h * spec.vocab_size,
        ),
    }


def row_bytes(numbers: int, kind: int) -> int:
    """Bytes of a row as a product takes it (`csrc/rows.h`): rounded up to groups of 32.

    Of a quantized kind: a byte a number, and a scale, a shift and a total a group.
    """
    rounded = -(-numbers // 32) * 32
    if kind in (F32, BF16):
        return rounded * (4 if kind == F32 else 2)
    return rounded + rounded // 32 * 12


def native_parts(
    runner: NativeRunner, seconds: dict[str, float], work: Work
) -> tuple[NativePart, ...]:
    """The parts of some steps by their time and their work, the longest first."""
    counted = count_parts(runner.decoder.spec, sizes_of(runner), work)
    parts = [NativePart(name, took, *counted[name]) for name, took in seconds.items()]
    return tuple(sorted(parts, key=lambda part: -part.seconds))
