"""The cells of a comparison: which method runs with which settings, and what each is called.

Every combination of the values of an option is a cell::

    --kv-memory 64MiB,128MiB --block-size 8,16            the base cell, first of each list: *

                     block 8     block 16
           64 MiB       *            ·          a row (`Variant`) for each method and allocator
          128 MiB       ·            ·          in each cell, over what it takes

A method varies only over what it takes: `hf-generate` over nothing, `hf-static` over the budget,
methods with blocks over budget and block size, `pagelab` over these, the placement where its
allocator is contiguous, and the watermark where it grows. What does not vary is the base's.

The second fair axis, the same batch, has rows of its own: the base cell once more, with at most as
many requests at once as `contiguous-max` holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pagelab.config import SchedulerConfig, format_bytes
from pagelab.errors import ConfigError
from pagelab.lab.methods import NATIVE, PAGED_METHODS, Cell, Variant
from pagelab.memory.allocators import Allocator, ContiguousMax, make_allocator
from pagelab.memory.placement import make_placement
from pagelab.results import Phase

_TAKES_NOTHING = ("hf-generate",)
_TAKES_BUDGET = ("hf-static",)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of each option; the first of each is the base cell's."""

    kv_memories: tuple[int, ...]  # bytes
    block_sizes: tuple[int, ...]
    watermarks: tuple[float, ...]
    placements: tuple[str, ...]

    @property
    def base(self) -> Cell:
        """What charts show first, and everything is measured against."""
        return Cell(
            self.kv_memories[0], self.block_sizes[0], self.watermarks[0], self.placements[0]
        )

    def cells(self, method: str, allocator: Allocator | None) -> Iterator[Cell]:
        """The cells in which a method runs."""
        base = self.base
        budgets = self.kv_memories if method not in _TAKES_NOTHING else (base.kv_memory,)
        blocks = self.block_sizes
        if method in _TAKES_NOTHING + _TAKES_BUDGET:
            blocks = (base.block_size,)
        watermarks: tuple[float, ...] = (base.watermark,)
        placements: tuple[str, ...] = (base.placement,)
        if allocator is not None and allocator.grows:
            watermarks = self.watermarks
        if allocator is not None and allocator.contiguous:
            placements = self.placements
        for values in itertools.product(budgets, blocks, watermarks, placements):
            yield Cell(*values)

    def label(self, name: str, method: str, allocator: Allocator | None, cell: Cell) -> str:
        """The name with what varies, for this method, from cell to cell."""
        cells = list(self.cells(method, allocator))
        parts = [name]
        for index, text in enumerate(
            (
                _budget_name(cell.kv_memory, self.kv_memories),
                f"block {cell.block_size}",
                f"watermark {cell.watermark * 100:g} %",
                cell.placement,
            )
        ):
            if len({other[index] for other in cells}) > 1:
                parts.append(text)
        return ", ".join(parts)


def expand(
    methods: Sequence[str],
    allocators: Sequence[str],
    grid: Grid,
    *,
    budget_axis: bool = True,
    batch: int | None = None,
    held: int = 0,
) -> tuple[Variant, ...]:
    """All rows in the order in which they run: the paged phase last.

    Args:
        methods: names, or `module:Class`.
        allocators: of the method `pagelab`.
        grid: the values of each option.
        budget_axis: the rows of the same budget.
        batch: requests at once in the rows of the same batch; None: no such rows.
        held: what `contiguous-max` holds at once in the base cell. Where that is `batch`, its row
            of the same budget is one of the same batch, too, and is not run twice.

    Raises:
        ConfigError: two rows would be called the same, there is none, or an allocator of one's
            own cannot be used.
    """
    rows: list[Variant] = []
    for method in methods:
        kinds: list[str | None] = list(allocators) if method == NATIVE else [None]
        for kind in kinds:
            allocator = _allocator(kind) if kind is not None else None
            name = f"{NATIVE} {allocator.name}" if allocator is not None else method
            phase = _phase(method, allocator)
            own = allocator.name if allocator is not None else None
            for cell in grid.cells(method, allocator) if budget_axis else ():
                label = grid.label(name, method, allocator, cell)
                rows.append(Variant(method, kind, label, phase, "budget", cell, own))
            if allocator is None or batch is None:
                continue
            already = isinstance(allocator, ContiguousMax) and batch == held and budget_axis
            if not already:
                label = f"{grid.label(name, method, allocator, grid.base)}, batch {batch}"
                cell = grid.base._replace(max_num_seqs=batch)
                rows.append(Variant(method, kind, label, phase, "batch", cell, own))
    _check(rows)
    return tuple(sorted(rows, key=lambda variant: variant.phase == "paged"))


def held_at_once(cell: Cell, max_model_len: int, bytes_per_token: int) -> int:
    """Requests that `contiguous-max` holds at the same time in this cell, by its own placement."""
    num_blocks = cell.kv_memory // (cell.block_size * bytes_per_token)
    if num_blocks == 0:
        return 0
    placement = make_placement(cell.placement, num_blocks)
    blocks = -(-max_model_len // cell.block_size)
    most = SchedulerConfig().max_num_seqs
    return next((n for n in range(most) if placement.take(blocks) is None), most)


def _allocator(kind: str) -> Allocator:
    try:
        return make_allocator(kind)
    except ConfigError as error:
        raise ConfigError(f"--allocators: {error}") from error


def _phase(method: str, allocator: Allocator | None) -> Phase:
    pages = allocator.grows and not allocator.contiguous if allocator else method in PAGED_METHODS
    return "paged" if pages else "traditional"


def _budget_name(size: int, sizes: Sequence[int]) -> str:
    """Short, and unlike that of every other budget: `64 MiB`, else the exact bytes."""

    def short(value: int) -> str:
        number, _, unit = format_bytes(value).partition(" ")
        return f"{float(number):g} {unit}"

    names = [short(value) for value in sizes]
    return short(size) if len(set(names)) == len(names) else f"{size} B"


def _check(rows: Sequence[Variant]) -> None:
    if not rows:
        raise ConfigError(
            "nothing to compare: --methods pagelab needs at least one of --allocators, and "
            "--axes batch needs the method pagelab"
        )
    seen: set[str] = set()
    for row in rows:
        if row.label in seen:
            raise ConfigError(
                f"two rows would be called {row.label!r}: --allocators names an allocator twice, "
                "or one's own has the name of another"
            )
        seen.add(row.label)
