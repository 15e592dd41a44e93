"""GPUs by name: how much memory they have, how fast it is read, how fast they multiply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from pagelab.errors import ConfigError

_MIB = 1 << 20
# bandwidths are published in decimal units; B, KB, … of 1000, KiB, … of 1024
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}I": float(1 << 10 * power) for power, letter in enumerate("KMGT", 1)
}


class Card(NamedTuple):
    """A GPU.

    Attributes:
        title: for people.
        memory_bytes: as its driver reports them.
        bandwidth: bytes a second, as published.
        matrix_rate: dense operations a second in 16 bits, as published.
    """

    title: str
    memory_bytes: int
    bandwidth: float
    matrix_rate: float


CARDS: Mapping[str, Card] = {
    "b200": Card("B200", 183_359 * _MIB, 8.0e12, 2250e12),
    "h200": Card("H200 SXM", 143_771 * _MIB, 4.8e12, 989e12),
    "h100": Card("H100 SXM 80 GB", 81_559 * _MIB, 3.35e12, 989e12),
    "h100-pcie": Card("H100 PCIe 80 GB", 81_559 * _MIB, 2.0e12, 756e12),
    "a100-80": Card("A100 SXM 80 GB", 81_920 * _MIB, 2.039e12, 312e12),
    "a100-40": Card("A100 SXM 40 GB", 40_960 * _MIB, 1.555e12, 312e12),
    "l40s": Card("L40S", 46_068 * _MIB, 0.864e12, 362e12),
    "a10": Card("A10", 23_028 * _MIB, 0.6e12, 125e12),
    "l4": Card("L4", 23_034 * _MIB, 0.3e12, 121e12),
    "t4": Card("T4", 15_360 * _MIB, 0.32e12, 65e12),
    "v100": Card("V100 SXM2 16 GB", 16_384 * _MIB, 0.9e12, 125e12),
    "rtx-5090": Card("GeForce RTX 5090", 32_607 * _MIB, 1.792e12, 209e12),
    "rtx-4090": Card("GeForce RTX 4090", 24_564 * _MIB, 1.008e12, 165e12),
    "rtx-3090": Card("GeForce RTX 3090", 24_576 * _MIB, 0.936e12, 71e12),
}
"""Cards by the name that `--gpu` takes. Bandwidths and rates: NVIDIA's data sheets."""


def find_card(name: str) -> Card:
    """A card by its name; `RTX 4090`, `rtx4090` and `rtx-4090` are the same.

    Raises:
        ConfigError: it is not in the table.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    found = {plain(key): card for key, card in CARDS.items()}.get(plain(name))
    if found is None:
        raise ConfigError(
            f"no --gpu {name!r}: choose one of {', '.join(CARDS)}, or give --gpu-memory and "
            "--bandwidth"
        )
    return found


def parse_bandwidth(text: str) -> float:
    """Read `3.35TB/s`, `936 GB/s` or `52GiB/s`: bytes a second.

    Raises:
        ConfigError: it is not a bandwidth, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?)?B?(?:/S)?\s*", text.upper())
    rate = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 0 < rate < 1e18:
        raise ConfigError(f"--bandwidth {text!r} is none: write 3.35TB/s or 936GB/s")
    return rate
