"""A bar while weights are loaded, where that takes more than a second."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from math import prod

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pagelab.models.passed_weights import PassedWeights
from pagelab.models.spec import ModelSpec
from pagelab.models.weights import expected_weights
from pagelab.native.packed import Blocks

_AFTER_S = 1.0


class LoadProgress:
    """Shows bytes loaded, on a terminal and after a second; silent otherwise. A context manager.

    Args:
        total_bytes: of all weights, as loaded.
        enabled: False: never shown.
        console: None: standard error.
        clock: seconds.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loaded_bytes = 0
        self._clock = clock
        self._shown_at = clock() + _AFTER_S
        self._progress = Progress(
            TextColumn("loading weights"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True) if console is None else console,
            transient=True,
        )
        self._enabled = enabled and self._progress.console.is_terminal
        self._task = self._progress.add_task("", total=total_bytes)
        self._started = False

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._progress.stop()

    @property
    def shown(self) -> bool:
        """Whether the bar has appeared."""
        return self._started

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are there."""
        self.loaded_bytes += num_bytes
        self._progress.update(self._task, completed=self.loaded_bytes)
        if self._enabled and not self._started and self._clock() >= self._shown_at:
            self._progress.start()
            self._started = True


class WatchedWeights(PassedWeights):
    """Weights whose taking is told to a `LoadProgress`."""

    def __init__(
        self, source: MutableMapping[str, torch.Tensor], progress: LoadProgress, size: int
    ) -> None:
        super().__init__(source)
        self._progress, self._size = progress, size

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        self._progress.advance(tensor.numel() * self._size)
        return tensor

    def blocks(self, name: str) -> Blocks | None:
        """As the source's; told as well."""
        blocks = super().blocks(name)
        if blocks is not None:
            self._progress.advance(len(blocks.data) * blocks.k * self._size)
        return blocks


def loaded_bytes(spec: ModelSpec, size: int) -> int:
    """Bytes of all weights where a number takes `size`."""
    return size * sum(prod(shape) for shape in expected_weights(spec).values())
