"""A runner that is watched: how long the host waits for it, and whether it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from pagelab.engine.core import Runner
from pagelab.scheduling.batch import Batch, StepResult

T = TypeVar("T")


class TimedRunner:
    """A runner, how many seconds the host waited for it, and how often it failed in a row."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.seconds = 0.0
        self.num_failures = 0  # steps, since one that did not fail

    def submit(self, batch: Batch) -> Any:
        """As the runner's."""
        return self._timed(lambda: self._runner.submit(batch))

    def collect(self, handle: Any) -> StepResult:
        """As the runner's."""
        result = self._timed(lambda: self._runner.collect(handle))
        self.num_failures = 0
        return result

    def _timed(self, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return call()
        except Exception:
            self.num_failures += 1
            raise
        finally:
            self.seconds += time.perf_counter() - started
