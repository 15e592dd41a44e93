"""What fits: a model's shape and a budget of bytes → blocks, tokens, full-length requests.

::

    the card  [ weights | activations | graphs | K/V                ]  1 - utilization
                                                 └ pages of equal bytes

Every figure is of one device; with `tp` devices each holds its share of the weights and heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.config import format_bytes
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.models.kv_geometry import KV_DTYPE_BYTES, PageLayout, page_layout
from pagelab.models.model_shape import ModelShape

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
"""Bytes of a weight; the scales of fp8 and int8 are left out."""

_GRAPH_BYTES_A_LAYER = 1 << 18
"""Device memory of one layer in one captured graph: about 0.25 MiB, an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What is planned for; the option of the same name sets each.

    Attributes:
        kv_memory: bytes for K/V on each device; None: what `gpu_memory` leaves.
        gpu_memory: bytes of each device; None only where `kv_memory` is given.
        gpu_memory_utilization: the share of the device that may be used.
        activation_memory, graph_memory: bytes; None: estimated.
        tp: devices that share the model.
        dtype: of the weights.
        kv_dtype: of K/V; None: as the weights.
        max_model_len: tokens a request may reach; None: the model's own maximum.
        block_size: tokens a block.
        max_num_batched_tokens: tokens of a step, for the activations.
        max_num_seqs: requests of a step, for logits and graphs.
    """

    kv_memory: int | None = None
    gpu_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    activation_memory: int | None = None
    graph_memory: int | None = None
    tp: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    max_model_len: int | None = None
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        if self.kv_memory is None and self.gpu_memory is None:
            raise ConfigError(
                "nothing to plan for: give --gpu-memory 24GiB, --gpu h100 or --kv-memory 18GiB"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization must be above 0 and at most 1, "
                f"not {self.gpu_memory_utilization}"
            )
        for name in ("tp", "block_size", "max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in WEIGHT_BYTES:
            raise ConfigError(f"no --dtype {self.dtype!r}: choose one of {', '.join(WEIGHT_BYTES)}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPE_BYTES:
            known = ", ".join(KV_DTYPE_BYTES)
            raise ConfigError(f"no --kv-dtype {self.kv_dtype!r}: choose one of {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What fits on each device.

    Attributes:
        shape: the model.
        settings: what was asked.
        max_model_len: tokens a request may reach.
        weight_bytes, activation_bytes, graph_bytes: on one device.
        kv_bytes: for K/V, on one device.
        layout: how K/V is cut into pages.
        num_pages: pages of the pool; for a model with one group these are its blocks.
    """

    shape: ModelShape
    settings: PlanSettings
    max_model_len: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    kv_bytes: int
    layout: PageLayout
    num_pages: int

    @property
    def unit(self) -> str:
        """What the pool is counted in: `blocks` where there is one group, else `pages`."""
        return "blocks" if len(self.layout.groups) == 1 else "pages"

    @property
    def pages_per_full_request(self) -> int:
        """Pages of one request of `max_model_len` tokens."""
        return self.layout.pages(self.max_model_len)

    @property
    def full_requests(self) -> float:
        """Requests of `max_model_len` tokens that the pool holds."""
        return self.num_pages / self.pages_per_full_request

    @property
    def tokens(self) -> int:
        """Tokens that the pool holds; with windows, in requests of `max_model_len`."""
        if len(self.layout.groups) == 1 and self.layout.groups[0].window is None:
            return self.num_pages * self.layout.block_size
        return self.num_pages * self.max_model_len // self.pages_per_full_request

    @property
    def total_bytes(self) -> int:
        """Weights, activations, graphs and K/V."""
        return self.weight_bytes + self.activation_bytes + self.graph_bytes + self.kv_bytes


def plan_memory(shape: ModelShape, settings: PlanSettings) -> MemoryPlan:
    """Plan a model's memory.

    Raises:
        ConfigError: a length, or a number of devices, that the model cannot have.
        InsufficientMemoryError: the weights, or a first block, do not fit.
    """
    tp = settings.tp
    check_tp(shape, tp)
    max_model_len = _max_model_len(shape, settings.max_model_len)
    kv_heads = shape.dimensions.num_kv_heads
    weights = shape.parameters.on_one_device(tp, kv_heads) * WEIGHT_BYTES[settings.dtype]
    activations = settings.activation_memory
    if activations is None:
        activations = activation_bytes(shape, settings)
    graphs = (
        graph_bytes(shape, settings) if settings.graph_memory is None else settings.graph_memory
    )
    kv_bytes = settings.kv_memory
    if kv_bytes is None:
        kv_bytes = _left_for_kv(settings, weights, activations, graphs)
    layout = page_layout(shape.groups, kv_dtype(settings), settings.block_size, tp)
    num_pages = kv_bytes // layout.page_bytes
    first = layout.pages(1)
    if num_pages < first:
        raise InsufficientMemoryError(
            f"{format_bytes(kv_bytes)} for K/V hold no block of {settings.block_size} tokens "
            f"({format_bytes(first * layout.page_bytes)}): raise --kv-memory or --gpu-memory, or "
            "lower --block-size"
        )
    return MemoryPlan(
        shape=shape,
        settings=settings,
        max_model_len=max_model_len,
        weight_bytes=weights,
        activation_bytes=activations,
        graph_bytes=graphs,
        kv_bytes=kv_bytes,
        layout=layout,
        num_pages=num_pages,
    )


def check_tp(shape: ModelShape, tp: int) -> None:
    """Check that a model can be split over this many devices.

    Raises:
        ConfigError: a size that does not divide.
    """
    d = shape.dimensions
    for name, size in (
        ("attention heads", d.num_heads),
        ("feed-forward rows", d.intermediate_size),
    ):
        if size % tp:
            raise ConfigError(f"--tp {tp} does not divide the {size} {name} of {shape.name}")
    if d.num_kv_heads % tp and tp % d.num_kv_heads:
        raise ConfigError(
            f"--tp {tp} neither divides the {d.num_kv_heads} K/V heads of {shape.name} nor is a "
            "multiple of them"
        )


def activation_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """An estimate of a step's largest intermediate results, on one device.

    For each of the step's tokens: the residual and its norm, and the larger of attention's
    (query, key, value, output) and the feed-forward's rows; for each request: float32 logits
    and their probabilities.
    """
    d, tp = shape.dimensions, settings.tp
    attention = 2 * d.num_heads * d.head_dim // tp
    attention += 2 * max(1, d.num_kv_heads // tp) * d.head_dim
    feed_forward = (3 if d.gated_mlp else 2) * d.intermediate_size * d.experts_per_token // tp
    numbers = 2 * d.hidden_size + max(attention, feed_forward)
    size = 4 if settings.dtype == "float32" else 2
    logits = settings.max_num_seqs * d.vocab_size * 2 * 4
    return settings.max_num_batched_tokens * numbers * size + logits


def graph_sizes(max_num_seqs: int) -> int:
    """How many batch sizes have a graph of their own: 1, 2, 4 and the multiples of 8."""
    return sum(size <= max_num_seqs for size in (1, 2, 4)) + max_num_seqs // 8


def graph_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """An estimate of what captured graphs of all batch sizes take, on one device."""
    layers = shape.dimensions.num_layers
    return graph_sizes(settings.max_num_seqs) * layers * _GRAPH_BYTES_A_LAYER


def kv_dtype(settings: PlanSettings) -> str:
    """The dtype of K/V: as asked, else the weights', else (of one-byte weights) bfloat16."""
    if settings.kv_dtype is not None:
        return settings.kv_dtype
    return settings.dtype if WEIGHT_BYTES[settings.dtype] > 1 else "bfloat16"


def _max_model_len(shape: ModelShape, asked: int | None) -> int:
    if asked is None:
        return shape.max_position
    if not 1 <= asked <= shape.max_position:
        raise ConfigError(
            f"--max-model-len {asked} is not from 1 to {shape.max_position}, "
            f"the maximum of {shape.name}"
        )
    return asked


def _left_for_kv(settings: PlanSettings, weights: int, activations: int, graphs: int) -> int:
    assert settings.gpu_memory is not None
    usable = int(settings.gpu_memory * settings.gpu_memory_utilization)
    left = usable - weights - activations - graphs
    if left <= 0:
        raise InsufficientMemoryError(
            f"weights ({format_bytes(weights)}), activations ({format_bytes(activations)}) and "
            f"graphs ({format_bytes(graphs)}) fill the {format_bytes(usable)} that may be used of "
            f"each device: raise --gpu-memory, --gpu-memory-utilization or --tp, or choose a "
            "smaller --dtype"
        )
    return left
