"""CUDA graphs, captured when a shape comes for the second time.

The first time a shape runs kernel by kernel (which also compiles what is not compiled yet), the
second time it is captured, and from then on a step costs the host one launch. So start-up
captures nothing, and a shape that comes once costs nothing more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class GraphCache:
    """Graphs by key, all with intermediate results in one pool: they never run at once.

    Args:
        enabled: off, every step runs kernel by kernel.
        limit: graphs kept; beyond it new shapes run kernel by kernel.
    """

    def __init__(self, *, enabled: bool = True, limit: int = 256) -> None:
        self.enabled, self.limit = enabled, limit
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._pool: Any = None  # torch names no type for it

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work` on the current stream, which must not be the default one.

        All that it reads and writes outside lies in the same place whenever the key is the same.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif not self.enabled or len(self._graphs) >= self.limit or key in self._refused:
            work()
        elif key not in self._seen:
            self._seen.add(key)
            work()
        else:
            try:
                graph = self._capture(key, work)
            except RuntimeError as error:  # no memory for it, say; nothing has run yet
                logger.warning("no CUDA graph for %s: %s", key, error)
                self._refused.add(key)
                work()
            else:
                graph.replay()

    def _capture(self, key: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # not `torch.cuda.graph`: it collects garbage and waits for the device, 0.1 s each time
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        self._graphs[key] = graph
        return graph
