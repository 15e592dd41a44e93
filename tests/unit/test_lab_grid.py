"""The grid: which rows there are, over what each varies, and what each is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.config import MemoryConfig
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.lab.grid import Grid, expand, held_at_once
from pagelab.lab.methods import Cell
from pagelab.memory.allocators import Demand
from pagelab.memory.kv_manager import KVManager
from pagelab.types import RequestId, SequenceId

MIB = 1 << 20
ONE = Grid((64 * MIB,), (16,), (0.05,), ("buddy",))


def labels(grid: Grid, methods: tuple[str, ...], *allocators: str, **options: int) -> list[str]:
    return [row.label for row in expand(methods, allocators, grid, **options)]  # type: ignore[arg-type]


def test_without_a_grid_names_are_bare_and_the_paged_phase_comes_last() -> None:
    rows = expand(
        ("vllm", "pagelab", "hf-static", "hf-continuous-batching"),
        ("paged", "reserved-paged", "contiguous-pow2"),
        ONE,
    )
    assert [(row.label, row.phase) for row in rows] == [
        ("pagelab reserved-paged", "traditional"),
        ("pagelab contiguous-pow2", "traditional"),
        ("hf-static", "traditional"),
        ("vllm", "paged"),
        ("pagelab paged", "paged"),
        ("hf-continuous-batching", "paged"),
    ]
    assert {row.cell for row in rows} == {ONE.base}
    assert [row.allocator_name for row in rows][:3] == ["reserved-paged", "contiguous-pow2", None]


def test_each_method_varies_over_what_it_takes_and_is_called_by_that() -> None:
    grid = Grid((64 * MIB, 128 * MIB), (8, 16), (0.0, 0.01), ("buddy", "first-fit"))
    assert labels(grid, ("hf-generate",)) == ["hf-generate"]
    assert labels(grid, ("hf-static",)) == ["hf-static, 64 MiB", "hf-static, 128 MiB"]
    assert labels(grid, ("vllm",)) == [
        "vllm, 64 MiB, block 8",
        "vllm, 64 MiB, block 16",
        "vllm, 128 MiB, block 8",
        "vllm, 128 MiB, block 16",
    ]
    paged = labels(grid, ("pagelab",), "paged")
    assert len(paged) == 2 * 2 * 2
    assert paged[0] == "pagelab paged, 64 MiB, block 8, watermark 0 %"
    assert paged[-1] == "pagelab paged, 128 MiB, block 16, watermark 1 %"
    contiguous = labels(grid, ("pagelab",), "contiguous-max")
    assert len(contiguous) == 2 * 2 * 2
    assert contiguous[-1] == "pagelab contiguous-max, 128 MiB, block 16, first-fit"
    assert len(labels(grid, ("pagelab",), "reserved-paged")) == 2 * 2  # neither grows nor a range
    assert len(labels(grid, ("of.my.own:Method",))) == 2 * 2


def test_what_does_not_vary_is_the_bases() -> None:
    grid = Grid((64 * MIB, 128 * MIB), (8, 16), (0.0, 0.01), ("first-fit", "buddy"))
    (alone,) = expand(("hf-generate",), (), grid)
    assert alone.cell == grid.base == Cell(64 * MIB, 8, 0.0, "first-fit", None)
    for row in expand(("pagelab",), ("contiguous-max",), grid):
        assert row.cell is not None
        assert row.cell.watermark == 0.0


def test_budgets_that_look_the_same_are_called_by_their_bytes() -> None:
    grid = Grid((64 * MIB, 64 * MIB + 1), (16,), (0.05,), ("buddy",))
    assert labels(grid, ("hf-static",)) == ["hf-static, 67108864 B", "hf-static, 67108865 B"]


def test_the_same_batch_has_rows_of_its_own_in_the_base_cell() -> None:
    grid = Grid((64 * MIB,), (16, 8), (0.05,), ("buddy",))
    rows = expand(("hf-static", "pagelab"), ("contiguous-max", "paged"), grid, batch=2, held=2)
    batch = [row for row in rows if row.axis == "batch"]
    assert [(row.label, row.cell) for row in batch] == [
        ("pagelab paged, block 16, batch 2", grid.base._replace(max_num_seqs=2))
    ]
    # fewer than contiguous-max holds: it must be capped, too; and so without the other axis
    for options in ({"batch": 1, "held": 2}, {"batch": 2, "held": 2, "budget_axis": False}):
        rows = expand(("pagelab",), ("contiguous-max", "paged"), ONE, **options)  # type: ignore[arg-type]
        assert [r.label for r in rows if r.axis == "batch"] == [
            f"pagelab contiguous-max, batch {options['batch']}",
            f"pagelab paged, batch {options['batch']}",
        ]
    assert [row.axis for row in rows] == ["batch", "batch"]


def test_rows_of_the_same_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two rows would be called 'pagelab paged'.*--alloc"):
        labels(ONE, ("pagelab",), "paged", "paged")
    with pytest.raises(ConfigError, match="nothing to compare: --methods pagelab needs"):
        labels(ONE, ("pagelab",))
    with pytest.raises(ConfigError, match="--allocators: no allocator 'buddy': choose"):
        labels(ONE, ("pagelab",), "buddy")


def test_ones_own_allocator_is_called_by_its_name_and_runs_in_its_phase(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n"
        "    name, contiguous, grows = 'mine', False, True\n"
        "    def slots(self, demand): return demand.num_tokens\n"
    )
    (row,) = expand(("pagelab",), (f"{file}:Mine",), ONE)
    assert (row.label, row.allocator_name, row.phase) == ("pagelab mine", "mine", "paged")
    assert row.allocator == f"{file}:Mine"


@given(
    st.integers(1, 300),
    st.sampled_from([1, 3, 8, 16]),
    st.integers(1, 200),
    st.sampled_from(["buddy", "first-fit"]),
)
def test_what_contiguous_max_holds_is_what_the_kv_manager_admits(
    num_blocks: int, block_size: int, max_model_len: int, placement: str
) -> None:
    cell = Cell(num_blocks * block_size * 10 + 9, block_size, 0.05, placement)
    held = held_at_once(cell, max_model_len, 10)
    config = MemoryConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        allocator="contiguous-max",
        placement=placement,
    )
    try:
        manager = KVManager(config)
    except InsufficientMemoryError:
        assert held == 0
        return
    count = 0
    while count < 256:
        sequence = SequenceId(RequestId(str(count)), 0)
        if manager.admit(sequence, Demand(1, 1, 1, 1, max_model_len), [1]) is None:
            break
        count += 1
    assert held == count


def test_a_budget_without_a_block_holds_nobody() -> None:
    assert held_at_once(Cell(100, 16, 0.05, "buddy"), 64, 1000) == 0
