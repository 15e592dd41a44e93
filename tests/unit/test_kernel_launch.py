"""How kernels are launched, or compiled ahead, with a stand-in for a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from pagelab.execution.gpu_runner import _load
from pagelab.kernels.launch import Device


class _Kernel:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def warmup(self, *arguments: Any, **options: Any) -> str:
        self.calls.append(("warmup", (arguments, options)))
        return "compiled"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            self.calls.append(("run", (grid, arguments, options)))

        return run


class _Compiled:
    loaded = False

    @property
    def run(self) -> None:
        self.loaded = True


class _Future:
    def __init__(self, compiled: _Compiled) -> None:
        self._compiled = compiled

    def result(self) -> _Compiled:
        return self._compiled


def test_a_launch_passes_the_grid_and_asks_for_dependent_launch_where_it_works() -> None:
    kernel = _Kernel()
    Device(4, pdl=True).launch(kernel, (2, 3), 7, num_warps=2)
    Device(4, pdl=False).launch(kernel, (1,), 8, num_warps=4)
    assert kernel.calls == [
        ("run", ((2, 3), (7,), {"num_warps": 2, "launch_pdl": True})),
        ("run", ((1,), (8,), {"num_warps": 4})),
    ]


def test_compiled_ahead_nothing_runs() -> None:
    kernel, compiled = _Kernel(), list[Any]()
    Device(4, pdl=True, compiled=compiled).launch(kernel, (2,), 7, num_warps=2)
    assert kernel.calls == [("warmup", ((7,), {"grid": (2,), "num_warps": 2, "launch_pdl": True}))]
    assert compiled == ["compiled"]


def test_kernels_are_loaded_whether_this_engine_compiled_them_or_one_before() -> None:
    own, earlier = _Compiled(), _Compiled()
    _load(_Future(own))
    _load(earlier)
    assert own.loaded
    assert earlier.loaded
