"""Frozen settings of an engine, and sizes in bytes.

Nothing changes a config after it is made: what is derived from a model (its length, the number
of blocks) is computed first and passed in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pagelab.errors import ConfigError

_UNITS = {"": 0, "K": 10, "KI": 10, "M": 20, "MI": 20, "G": 30, "GI": 30, "T": 40, "TI": 40}


def parse_bytes(text: str | int) -> int:
    """Read a size: `268435456`, `"256MiB"`, `"18.1 GiB"`. K, M, G and T are binary units.

    Raises:
        ConfigError: it is not a size, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?)?B?\s*", str(text).upper())
        if match is None:
            raise ConfigError(f"not a size in bytes: {text!r} (write 268435456 or 256MiB)")
        size = int(min(float(match[1]), 1e15) * (1 << _UNITS[match[2] or ""]))
    if size <= 0:
        raise ConfigError(f"a size in bytes must be positive, not {text!r}")
    return size


def format_bytes(size: float) -> str:
    """Write a size with a binary unit: `format_bytes(268435456) == "256.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_share(text: str) -> float:
    """Read a share of a whole: `0.05` or `5%`.

    Raises:
        ConfigError: it is no number.
    """
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    if re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", number) is None:
        raise ConfigError(f"not a share: {text!r} (write 0.05 or 5%)")
    return float(number) / 100 if percent else float(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The KV pool and who gets what of it.

    Attributes:
        num_blocks: blocks in the pool.
        block_size: slots a block.
        max_model_len: tokens a request may reach; what `contiguous-max` reserves.
        allocator: `paged`, `contiguous-max`, … (`pagelab.memory.allocators.ALLOCATORS`), or one's
            own as `module:Class` or `file.py:Class`.
        placement: where contiguous ranges go: `buddy` or `first-fit`.
        prefix_caching: reuse blocks with the same content; off under contiguous allocators.
        watermark: share of the blocks that an admission must leave free.
        check_invariants: check the whole memory core after every step (slow).
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 2048
    allocator: str = "paged"
    placement: str = "buddy"
    prefix_caching: bool = True
    watermark: float = 0.05
    check_invariants: bool = False

    def __post_init__(self) -> None:
        _require("num_blocks", self.num_blocks, 1)
        _require("block_size", self.block_size, 1)
        _require("max_model_len", self.max_model_len, 1)
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be from 0 to below 1, not {self.watermark}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How much one step may do.

    Attributes:
        max_num_batched_tokens: the token budget of a step, shared by all requests in it.
        max_num_seqs: sequences that run at the same time.
        max_steps_in_flight: steps submitted before the oldest is collected.
    """

    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256
    max_steps_in_flight: int = 1

    def __post_init__(self) -> None:
        _require("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _require("max_num_seqs", self.max_num_seqs, 1)
        _require("max_steps_in_flight", self.max_steps_in_flight, 1)


def _require(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
