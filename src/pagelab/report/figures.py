"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Iterable

from pagelab.config import format_bytes
from pagelab.results import KVCapacity, RunSettings


def seconds(value: float) -> str:
    """A duration with about three digits: `0.4 ms`, `120 ms`, `1.23 s`, `54.9 s`."""
    if value == 0:
        return "0 s"
    if abs(value) < 0.0995:
        return f"{value * 1e3:.1f} ms"
    if abs(value) < 0.9995:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if abs(value) < 9.995 else f"{value:,.1f} s"


def rate(value: float) -> str:
    """A rate or a mean with about three digits: `0.83`, `9.6`, `119`."""
    if abs(value) < 0.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share of one in percent: `55 %`, `1.2 %` where small."""
    value = share * 100
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


def times(ratio: float) -> str:
    """How many times as much: `2.6`, `0.83`."""
    return f"{ratio:.2f}" if ratio < 0.995 else f"{ratio:.1f}" if ratio < 99.5 else f"{ratio:,.0f}"


def interval(low: str, high: str) -> str:
    """Two figures as a range with one unit: `54.5–58.4 ms`; empty where they read the same."""
    if low == high:
        return ""
    number, _, unit = low.partition(" ")
    return f"{number if unit and high.endswith(f' {unit}') else low}–{high}"


def joined(names: Iterable[str]) -> str:
    """Names as a list in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def size(value: float) -> str:
    """Bytes without needless digits: `64 MiB`, `1.5 GiB`."""
    number, _, unit = format_bytes(value).partition(" ")
    return f"{number.removesuffix('.0')} {unit}"


def watermark(value: float) -> str:
    """A share of the blocks as it was asked: `1 %`, `2.5 %`."""
    return f"{value * 100:g} %"


def capacity(kv: KVCapacity | None) -> str:
    """A method's KV capacity: `127.9 MiB, 2,912 slots`."""
    return "–" if kv is None else f"{format_bytes(kv['bytes'])}, {kv['slots']:,} slots"


def cell(settings: RunSettings) -> str:
    """A cell of the grid: `64 MiB, blocks of 16, watermark 1 %, buddy`."""
    return (
        f"{size(settings['kv_memory_bytes'])}, blocks of {settings['block_size']}, "
        f"watermark {watermark(settings['watermark'])}, {settings['placement']}"
    )
