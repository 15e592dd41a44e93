"""The progress of a benchmark on a terminal: a bar a run; nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pagelab.bench.run import OnTokens


class BenchProgress:
    """Shows one stage after another; a `bench.session.Stage`.

    The bar is drawn twice a second, and told of tokens five times a second at most: drawing takes
    a millisecond or two of the thread that also schedules.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
            transient=True,
            disable=not console.is_terminal,
        )

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[OnTokens]:
        """Show a stage of so many tokens; 0: nobody knows how long it takes."""
        task = self._bars.add_task(name, total=total or None, tokens="")

        def on_tokens(done: int) -> None:
            elapsed = self._bars.tasks[-1].elapsed or 0.0
            rate = f"{done / elapsed:,.0f} tok/s" if elapsed > 0 else ""
            self._bars.update(task, completed=done, tokens=rate)

        self._bars.start()
        try:
            yield on_tokens
        finally:
            self._bars.remove_task(task)
            self._bars.stop()
