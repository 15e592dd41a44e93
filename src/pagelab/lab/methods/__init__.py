"""The methods that an experiment can compare, each run in a process of its own.

Importing this package imports no method: the worker imports the one that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pagelab.errors import ConfigError
from pagelab.results import Axis, Phase

METHODS = {
    "hf-generate": "pagelab.lab.methods.hf_generate:HfGenerate",
    "hf-static": "pagelab.lab.methods.hf_static:HfStatic",
    "hf-continuous-batching": "pagelab.lab.methods.hf_continuous_batching:HfContinuousBatching",
    "vllm": "pagelab.lab.methods.vllm_offline:Vllm",
    "pagelab": "pagelab.lab.methods.native:Native",
}
"""Name → where its class is."""

NATIVE = "pagelab"
PAGED_METHODS = ("hf-continuous-batching", "vllm")  # the methods of others that page
DEFAULT_METHODS = ("hf-generate", "hf-static", "pagelab")
DEFAULT_ALLOCATORS = ("contiguous-max", "paged")


class Cell(NamedTuple):
    """Settings of a run: where it stands in the grid. See `pagelab.lab.grid`."""

    kv_memory: int  # bytes
    block_size: int
    watermark: float
    placement: str
    max_num_seqs: int | None = None  # None: the method's default


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the comparison: one method in one cell of the grid.

    Attributes:
        method: its name, or `module:Class`.
        allocator: of the method `pagelab`, as asked: a name, `module:Class` or `file.py:Class`.
        label: unique in an experiment.
        phase: when it runs.
        axis: which fair comparison it belongs to.
        cell: its settings; None: the experiment's base cell.
        allocator_name: what the allocator calls itself.
    """

    method: str
    allocator: str | None
    label: str
    phase: Phase
    axis: Axis = "budget"
    cell: Cell | None = None
    allocator_name: str | None = None


def check_methods(methods: tuple[str, ...]) -> None:
    """Refuse names that are no methods.

    Raises:
        ConfigError: a name that is not known (lists those that are), or one named twice.
    """
    if not methods:
        raise ConfigError(f"--methods is empty: name at least one of {', '.join(METHODS)}")
    for method in methods:
        method_path(method)
    if len(set(methods)) < len(methods):
        raise ConfigError("--methods names a method twice")


def method_path(method: str) -> tuple[str, str]:
    """Module and class of a method.

    Raises:
        ConfigError: it is neither known nor `module:Class`.
    """
    module, colon, name = METHODS.get(method, method).partition(":")
    if not colon or not module or not name:
        raise ConfigError(
            f"no method {method!r}: --methods takes {', '.join(METHODS)}, or module:Class"
        )
    return module, name
