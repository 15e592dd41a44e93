"""The progress of `pagelab compare` on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pagelab.config import format_bytes
from pagelab.lab.events import (
    CapacityReported,
    Event,
    ExperimentFinished,
    ExperimentStarted,
    PhaseStarted,
    ProgressMade,
    RunFinished,
    RunStarted,
    StageReached,
    WorkloadFinished,
)
from pagelab.results import ExperimentInfo, MethodRun, Results, Snapshot, WorkloadInfo

PHASE_TITLES = {
    "traditional": "Phase 1: the traditional method",
    "paged": "Phase 2: PagedAttention",
}


class CompareProgress:
    """Shows an experiment's events; use it as a context manager and as `on_event`.

    >>> with CompareProgress(Console()) as progress:          # doctest: +SKIP
    ...     run_experiment(settings, progress)

    On a terminal each workload has a bar with tokens, tokens a second and the time left; the
    memory snapshots are printed above it as they come. Elsewhere only lines are printed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._workloads: list[WorkloadInfo] = []
        self._runs = self._run = 0
        self._started = 0.0

    def __enter__(self) -> CompareProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away: before a question, or at the end."""
        self._drop_bar()
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, ExperimentStarted):
            self._runs = len(event.variants) * event.results["experiment"]["repeats"]
            self._print_experiment(event.results)
        elif isinstance(event, PhaseStarted):
            self._bars.start()  # it may have been closed for `--pause`
            self._console.print()
            self._console.rule(f"[bold]{PHASE_TITLES[event.phase]}", align="left")
        elif isinstance(event, RunStarted):
            self._start_run(event)
        elif isinstance(event, StageReached):
            self._print_snapshot(event.snapshot)
            if event.snapshot["label"] == "warmed up":
                self._next_bar(0)
        elif isinstance(event, CapacityReported):
            text = f"{event.capacity['slots']:,} tokens; {event.capacity['note']}"
            self._line(f"[dim]KV: {escape(text)}")
        elif isinstance(event, ProgressMade):
            self._advance(event)
        elif isinstance(event, WorkloadFinished):
            run = event.run
            self._line(
                f"[bold]{run['name']}[/]: {run['output_tokens']} tokens in "
                f"{run['duration_s']:.2f} s, [bold]{run['output_tokens_per_s']:,.1f} tok/s[/]"
            )
            self._next_bar(1 + self._position(run["name"]))
        elif isinstance(event, RunFinished):
            self._finish_run(event.run)
        elif isinstance(event, ExperimentFinished):
            self._drop_bar()
            if event.results["note"] is not None:
                self._console.print(f"\n[yellow]{escape(event.results['note'])}")

    # Bars

    def _position(self, name: str) -> int:
        return next(i for i, w in enumerate(self._workloads) if w["name"] == name)

    def _next_bar(self, position: int) -> None:
        self._drop_bar()
        self._started = time.monotonic()
        if position < len(self._workloads):
            workload = self._workloads[position]
            total = sum(request["max_tokens"] for request in workload["requests"])
            self._task = self._bars.add_task(workload["name"], total=total, rate="")

    def _drop_bar(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _advance(self, event: ProgressMade) -> None:
        if self._task is None:  # it warms up
            self._started = time.monotonic()
            self._task = self._bars.add_task(event.workload, total=event.total, rate="")
        elapsed = time.monotonic() - self._started
        rate = f"{event.done / elapsed:,.1f} tok/s" if elapsed > 0 else ""
        self._bars.update(self._task, completed=event.done, total=event.total, rate=rate)

    # Lines

    def _line(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False, soft_wrap=True)

    def _start_run(self, event: RunStarted) -> None:
        self._run += 1
        repeat = f", repeat {event.repeat + 1} of {event.repeats}" if event.repeats > 1 else ""
        self._console.print(
            f"\n[bold cyan]{escape(event.variant.label)}[/]"
            f" [dim](run {self._run} of {self._runs}{repeat})",
            highlight=False,
        )

    def _print_snapshot(self, snapshot: Snapshot) -> None:
        device = snapshot["device_bytes"]
        gpu = f"  GPU {format_bytes(device):>10}" if device is not None else ""
        self._line(
            f"[dim]{snapshot['t']:8.2f} s[/]  {escape(snapshot['label']):<34}"
            f"  RSS {format_bytes(snapshot['rss_bytes']):>10}{gpu}"
            f"  KV allocated {format_bytes(snapshot['kv_allocated_bytes']):>10}"
            f"  live {format_bytes(snapshot['kv_live_bytes']):>10}"
        )

    def _finish_run(self, run: MethodRun) -> None:
        self._drop_bar()
        if run["status"] == "ok":
            startup = run["startup"]
            assert startup is not None
            self._line(
                f"[dim]import {startup['import_s']:.1f} s, load {startup['load_s']:.1f} s, "
                f"warm-up {startup['warmup_s']:.1f} s; peak RSS "
                f"{format_bytes(run['peak_rss_bytes'] or 0)}"
            )
        else:
            colour = "yellow" if run["status"] in ("unavailable", "interrupted") else "red"
            self._line(f"[{colour}]{run['status']}[/]: {escape(run['reason'] or '')}")

    def _print_experiment(self, results: Results) -> None:
        asked, environment = results["experiment"], results["environment"]
        self._workloads = asked["workloads"]
        model, blocks = asked["model"], _joined(asked["block_sizes"])
        rows = [
            ("machine", machine_line(environment)),
            ("software", software_line(environment)),
            (
                "model",
                f"{model['name']} ({model['architecture']}, "
                f"{model['num_parameters'] / 1e6:,.1f} M parameters), {asked['dtype']}",
            ),
            (
                "KV budget",
                f"{_budgets(asked)} of {format_bytes(model['kv_bytes_per_token'])}; a request may "
                f"reach {asked['max_model_len']:,} tokens; blocks of {blocks}",
            ),
            *_grid_rows(asked, self._runs),
            ("sampling", f"{asked['sampling']}; {asked['threads']} threads"),
            *((w["name"], w["title"]) for w in asked["workloads"]),
        ]
        for name, text in rows:
            self._console.print(
                f"[bold]{escape(name):>10}[/]  {escape(text)}", highlight=False, soft_wrap=True
            )


def _budgets(asked: ExperimentInfo) -> str:
    """Every budget in bytes and tokens."""
    size = asked["model"]["kv_bytes_per_token"]
    return ", ".join(
        f"{format_bytes(memory)} = {memory // size:,} tokens" for memory in asked["kv_memories"]
    )


def _grid_rows(asked: ExperimentInfo, runs: int) -> list[tuple[str, str]]:
    """What else varies."""
    parts = [f"{runs} runs"]
    if len(asked["watermarks"]) > 1:
        parts.append(f"watermarks {_joined([f'{w:.3g}' for w in asked['watermarks']])}")
    if len(asked["placements"]) > 1:
        parts.append(f"placements {_joined(asked['placements'])}")
    if asked["batch"] is not None:
        parts.append(f"the same batch of {asked['batch']} as a second axis")
    return [("grid", "; ".join(parts))]


def _joined(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def machine_line(environment: dict[str, Any]) -> str:
    """The machine in one line."""
    cpu, memory = environment["cpu"], environment["memory"]
    sets = " ".join(cpu["instruction_sets"]) or "no vector sets known"
    cards = ", ".join(gpu["name"] for gpu in environment["gpus"]) or "no GPU"
    return (
        f"{environment['os']['name']}, {cpu['model']}, {cpu['cores']} cores ({sets}), "
        f"{format_bytes(memory['available_bytes'])} of {format_bytes(memory['total_bytes'])} "
        f"RAM available, {cards}"
    )


def software_line(environment: dict[str, Any]) -> str:
    """The software in one line."""
    torch = environment["torch"]
    return (
        f"Python {environment['python']['version']}, "
        f"torch {torch['version'] if torch else 'not installed'}, "
        f"transformers {environment['packages']['transformers'] or 'not installed'}, "
        f"PageLab {environment['pagelab'] or 'unknown'}"
    )
