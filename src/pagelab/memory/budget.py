"""What a device's memory is divided into, computed before anything is allocated.

::

    total   | in use before |                     free at start                     |
                            |           utilization × free           |  left free   |
                            | weights | activations | graphs |  K/V  |
                                                             └ whole blocks

Plain numbers in, plain numbers out: what a model's weights and steps take is the caller's to
know (`execution.footprint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pagelab.config import format_bytes
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.memory.layout import KVLayout

DEFAULT_UTILIZATION = 0.9
"""Share of a GPU's free memory that is used where nobody says."""


_SMALLER_STEPS = "lower --max-num-batched-tokens or --max-num-seqs"
_HALF = "choose --dtype bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device's memory at start, in bytes.

    Attributes:
        device: `cpu`, `cuda:0`, …
        total_bytes: of the card; on a CPU, of the machine or the container.
        free_bytes: what nobody has, once this process's CUDA context is there.
        num_sms: multiprocessors, which some workspaces grow with; 0 on a CPU.
    """

    device: str
    total_bytes: int
    free_bytes: int
    num_sms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What an engine takes beside K/V, in bytes.

    Attributes:
        weights: resident for as long as the engine lives.
        activations: what a step's results and workspaces take, by name.
        graphs: an allowance for CUDA graphs; 0 without.
    """

    weights: int
    activations: Mapping[str, int] = field(default_factory=dict)
    graphs: int = 0

    @property
    def activation_bytes(self) -> int:
        """All activations."""
        return sum(self.activations.values())

    @property
    def total_bytes(self) -> int:
        """Weights, activations and graphs."""
        return self.weights + self.activation_bytes + self.graphs


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Who gets what of a device's memory; all sizes in bytes.

    Attributes:
        device: `cpu`, `cuda:0`, …
        total_bytes, free_bytes: of the device, at start.
        utilization: share of the free memory that may be used; None where `kv_memory` was given.
        weight_bytes, activation_bytes, graph_bytes: see `Footprint`.
        activations: the activations by name.
        num_blocks: of the KV pool.
        block_bytes: of one block, all layers.
        block_size: tokens a block.
        max_model_len: tokens that a request may reach.
    """

    device: str
    total_bytes: int
    free_bytes: int
    utilization: float | None
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    activations: Mapping[str, int]
    num_blocks: int
    block_bytes: int
    block_size: int
    max_model_len: int

    @property
    def used_before_bytes(self) -> int:
        """What others held at start, and what the driver needs for this process."""
        return self.total_bytes - self.free_bytes

    @property
    def kv_bytes(self) -> int:
        """The KV pool."""
        return self.num_blocks * self.block_bytes

    @property
    def left_bytes(self) -> int:
        """What stays free; negative where more was asked for than there is."""
        needed = self.weight_bytes + self.activation_bytes + self.graph_bytes + self.kv_bytes
        return self.free_bytes - needed

    @property
    def tokens(self) -> int:
        """Tokens whose K/V the pool holds."""
        return self.num_blocks * self.block_size

    @property
    def full_requests(self) -> float:
        """Requests of `max_model_len` tokens that the pool holds."""
        return self.num_blocks / -(-self.max_model_len // self.block_size)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; `MemoryBudget(**data)` reads it."""
        return asdict(self) | {"activations": dict(self.activations)}


def budget_from_free_memory(
    memory: DeviceMemory,
    footprint: Footprint,
    layout: KVLayout,
    *,
    max_model_len: int,
    utilization: float = DEFAULT_UTILIZATION,
) -> MemoryBudget:
    """Give K/V what a share of the free memory leaves.

    Raises:
        ConfigError: a utilization that is no share.
        InsufficientMemoryError: less is left than one request of `max_model_len` needs.
    """
    if not 0 < utilization <= 1:
        raise ConfigError(
            f"--gpu-memory-utilization must be above 0 and at most 1, not {utilization}"
        )
    left = int(memory.free_bytes * utilization) - footprint.total_bytes
    blocks = max(0, left) // layout.bytes_per_block
    if blocks < -(-max_model_len // layout.block_size):
        raise InsufficientMemoryError(
            _too_small(memory, footprint, layout, max_model_len, utilization, left)
        )
    return _budget(memory, footprint, layout, max_model_len, utilization, blocks)


def budget_from_kv_memory(
    memory: DeviceMemory,
    footprint: Footprint,
    layout: KVLayout,
    *,
    max_model_len: int,
    kv_memory: int,
    must_fit: bool,
) -> MemoryBudget:
    """Give K/V what was asked for.

    With `must_fit`, what the free memory does not hold is refused (a CPU's estimate is too rough
    for that).

    Raises:
        InsufficientMemoryError: not even a block fits into `kv_memory`, or it does not fit beside
            the weights and activations (graphs, a mere allowance, are not counted against it).
    """
    budget = _budget(memory, footprint, layout, max_model_len, None, layout.num_blocks(kv_memory))
    if must_fit and budget.left_bytes + budget.graph_bytes < 0:
        most = budget.left_bytes + budget.graph_bytes + budget.kv_bytes
        ways = [f"lower --kv-memory to {_exact(most)} at most"] if most > 0 else []
        ways.append(_SMALLER_STEPS)
        if layout.dtype == "float32":
            ways.append(_HALF)
        raise InsufficientMemoryError(
            f"a KV pool of {_exact(budget.kv_bytes)} does not fit on {memory.device}: "
            f"{_exact(memory.free_bytes)} are free, weights take {_exact(footprint.weights)} and "
            f"activations {_exact(footprint.activation_bytes)}: {', or '.join(ways)}"
        )
    return budget


def _budget(
    memory: DeviceMemory,
    footprint: Footprint,
    layout: KVLayout,
    max_model_len: int,
    utilization: float | None,
    num_blocks: int,
) -> MemoryBudget:
    return MemoryBudget(
        device=memory.device,
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        utilization=utilization,
        weight_bytes=footprint.weights,
        activation_bytes=footprint.activation_bytes,
        graph_bytes=footprint.graphs,
        activations=dict(footprint.activations),
        num_blocks=num_blocks,
        block_bytes=layout.bytes_per_block,
        block_size=layout.block_size,
        max_model_len=max_model_len,
    )


def _too_small(
    memory: DeviceMemory,
    footprint: Footprint,
    layout: KVLayout,
    max_model_len: int,
    utilization: float,
    left: int,
) -> str:
    """What is needed, what is there, and what to change."""
    needed = -(-max_model_len // layout.block_size) * layout.bytes_per_block
    usable = int(memory.free_bytes * utilization)
    text = (
        f"no room for K/V on {memory.device}: one request of max_model_len = {max_model_len:,} "
        f"tokens needs {_exact(needed)}; {_exact(usable)} may be used "
        f"({utilization:g} × {_exact(memory.free_bytes)} free), and weights "
        f"({_exact(footprint.weights)}), activations ({_exact(footprint.activation_bytes)}) and "
        f"graphs ({_exact(footprint.graphs)}) "
    )
    text += f"leave {_exact(left)}: " if left >= 0 else f"need {_exact(-left)} more than that: "
    fitting = max(0, left) // layout.bytes_per_block * layout.block_size
    ways = [f"lower --max-model-len to {fitting}"] if fitting > 0 else []
    if left + footprint.activation_bytes + footprint.graphs >= needed or not ways:
        ways.append(_SMALLER_STEPS)
    if layout.dtype == "float32":
        ways.append(_HALF)
    if utilization < 1 and memory.free_bytes - footprint.total_bytes >= needed:
        ways.append("raise --gpu-memory-utilization (or give --kv-memory instead)")
    return text + ", or ".join(ways)


def _exact(size: int) -> str:
    return f"{format_bytes(size)} = {size:,} bytes"
