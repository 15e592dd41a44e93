"""What an engine takes beside K/V, from a model's spec alone. Knows no tensors.

What `gpu_runner` and `fused_decoder` allocate once is counted exactly (a test adds up a runner's
tensors); the peak of a step is what the layer with the most live results holds; graphs and
libraries are allowances.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.execution.buckets import (
    MAX_GRAPH_TOKENS,
    decode_bucket,
    decode_buckets,
    largest_step,
)
from pagelab.kernels.sizes import (
    DESCRIPTOR,
    MAX_CHANGES,
    MAX_LINEAR_ROWS,
    MAX_SUPPRESSED,
    SAMPLING_CANDIDATES,
    SAMPLING_LEVELS,
    SAMPLING_TILE,
    SMALLEST_PEAK_BLOCK,
    TILE,
    TILE_ROWS,
    row_stats_width,
    split_blocks,
    split_sums,
)
from pagelab.memory.budget import Footprint
from pagelab.memory.layout import DTYPE_BYTES
from pagelab.models.parameters import count_parameters, dimensions_of
from pagelab.models.spec import ModelSpec

GRAPH_BYTES_A_LAYER = 1 << 18
"""Driver memory of one layer in one captured graph: about 0.25 MiB, as the planner's estimate."""

LIBRARY_BYTES = 96 << 20
"""cuBLAS's workspaces (32 MiB a stream on an H100, two streams) and the loaded kernels."""

_ROUNDING_BYTES = 1 << 20
"""torch rounds large tensors up to 2 MiB: half of that each, on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How large a step may get, which is what buffers are sized for."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    max_steps_in_flight: int = 1


def weight_bytes(spec: ModelSpec, dtype: str, quantization: str | None = None) -> int:
    """Bytes of a model's weights; tied embeddings once, an untied head as well.

    Quantized: tables of the vocabulary 8.5 bits a weight, matrices 8 or 5 (scales included),
    norms and biases in float32.
    """
    if quantization is None:
        return spec.num_parameters * DTYPE_BYTES[dtype]
    count = count_parameters(dimensions_of(spec))
    tables, matrices = count.embedding + count.head, count.sharded + count.kv
    bits = {"int8": 8, "q4": 5}[quantization]
    others = count.total - tables - matrices
    return tables * 17 // 16 + matrices * bits // 8 + 4 * others


def plain_footprint(
    spec: ModelSpec, dtype: str, limits: StepLimits, quantization: str | None = None
) -> Footprint:
    """Of the runners that allocate as they go (`model_runner`, `native_runner`): a rough
    estimate of their peak.
    """
    tokens = limits.max_num_batched_tokens
    size = DTYPE_BYTES[dtype]
    logits = min(limits.max_num_seqs, tokens) * spec.vocab_size * (4 + size)
    layer = tokens * (spec.hidden_size + _live_numbers(spec)) * size
    return Footprint(
        weights=weight_bytes(spec, dtype, quantization),
        activations={"logits": logits, "largest layer": layer},
    )


def gpu_footprint(
    spec: ModelSpec, dtype: str, limits: StepLimits, *, num_sms: int, graphs: bool = True
) -> Footprint:
    """Of `gpu_runner.GpuRunner`.

    Args:
        spec: the model.
        dtype: of weights and activations.
        limits: of a step.
        num_sms: multiprocessors of the GPU.
        graphs: CUDA graphs will be captured.
    """
    tokens, seqs = largest_step(limits.max_num_batched_tokens, limits.max_num_seqs)
    size = DTYPE_BYTES[dtype]
    target_items = max(1, 2 * num_sms // spec.num_kv_heads)
    per_token = _live_numbers(spec) * size
    rotary = 8 * max(1, spec.head_dim // 2)  # cos and sin, float32
    row_sums = 8 * row_stats_width(spec.hidden_size)  # of squares and of numbers, float32
    folded = 4 * spec.num_layers * _folded_rows(spec) if spec.norm == "layernorm" else 0
    activations = {
        "residual": tokens * (spec.hidden_size * size + rotary + row_sums),
        "logits": 4 * seqs * spec.vocab_size,
        "sampling": _sampling_bytes(spec, seqs),
        "split sums": _split_bytes(spec, limits, seqs, target_items),
        "state, inputs": _state_bytes(spec, limits, tokens, seqs, target_items),
        # loading is over before the first step: the two never meet
        "largest layer": max(tokens * per_token, _loading_bytes(spec, size)),
        "libraries": LIBRARY_BYTES + 5 * spec.num_layers * _ROUNDING_BYTES,
        "scratch block": spec.kv_layout(dtype, limits.block_size).bytes_per_block,
    }
    captured = decode_buckets(decode_bucket(limits.max_num_seqs)) * GRAPH_BYTES_A_LAYER
    shared = min(tokens, MAX_GRAPH_TOKENS) * per_token  # one pool of results for all graphs
    return Footprint(
        weights=weight_bytes(spec, dtype) + folded,
        activations=activations,
        graphs=captured * spec.num_layers + shared if graphs else 0,
    )


def _qkv_rows(spec: ModelSpec) -> int:
    return (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim


def _folded_rows(spec: ModelSpec) -> int:
    """Outputs of the products that a norm is folded into."""
    return _qkv_rows(spec) + spec.intermediate_size * (2 if spec.gated_mlp else 1)


def _live_numbers(spec: ModelSpec) -> int:
    """Numbers a token that live at once at a layer's peak, beside the residual.

    ::

        attention     pending | normed | qkv of the layer before | qkv | q, out | MLP's of before
        feed-forward  pending | normed | qkv | gate and up | product | MLP's of the layer before
    """
    inner, qkv = spec.intermediate_size, _qkv_rows(spec)
    attention = inner + qkv + max(qkv, 2 * spec.num_heads * spec.head_dim)
    feed_forward = qkv + (4 if spec.gated_mlp else 2) * inner
    return 2 * spec.hidden_size + max(attention, feed_forward)


def _loading_bytes(spec: ModelSpec, size: int) -> int:
    """Copies at most while the decoder is built.

    Merged layers: the parts beside the whole. GPT-2's matrices are stored `[in, out]`: all of
    them are turned before the first is let go; and folding LayerNorm takes a float32 copy.
    """
    if spec.architecture != "gpt2":
        return 2 * spec.intermediate_size * spec.hidden_size * size
    hidden, inner = spec.hidden_size, spec.intermediate_size
    matrices = (_qkv_rows(spec) + spec.num_heads * spec.head_dim + 2 * inner) * hidden
    return spec.num_layers * matrices * size + 4 * inner * hidden


def _sampling_bytes(spec: ModelSpec, seqs: int) -> int:
    tiles = -(-spec.vocab_size // SAMPLING_TILE)
    workspace = seqs * (tiles * (3 + 2 * SAMPLING_LEVELS) + 2 * SAMPLING_CANDIDATES + 1)
    peaks = min(seqs, MAX_LINEAR_ROWS) * 2 * -(-spec.vocab_size // SMALLEST_PEAK_BLOCK)
    return 4 * (workspace + peaks)


def _split_bytes(spec: ModelSpec, limits: StepLimits, seqs: int, target_items: int) -> int:
    products = split_sums(spec.hidden_size) + split_blocks(spec.hidden_size)
    items = max(decode_bucket(limits.max_num_seqs), seqs) + target_items
    attention = items * (DESCRIPTOR + spec.num_heads * (spec.head_dim + 2))
    return 4 * (products + attention + seqs * spec.num_kv_heads)


def _state_bytes(
    spec: ModelSpec, limits: StepLimits, tokens: int, seqs: int, target_items: int
) -> int:
    steps = max(2, limits.max_steps_in_flight)
    rows = steps * decode_bucket(limits.max_num_seqs) + 1
    blocks = -(-limits.max_model_len // limits.block_size)
    arena = rows * (blocks + 12 + MAX_SUPPRESSED)
    group = 1 << (spec.num_heads // spec.num_kv_heads - 1).bit_length()
    tile = max(1, TILE_ROWS // group)
    tiles = tokens // tile + min(seqs, tokens // 2) + 1
    inputs = 3 * tokens + 4 * seqs + tiles * TILE + (seqs + target_items) * DESCRIPTOR
    results = 4 * seqs
    return 4 * (arena + inputs + results + 2 * MAX_CHANGES + 64)
