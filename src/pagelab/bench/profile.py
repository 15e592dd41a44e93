"""Where a step's time goes: a trace for Perfetto, and sums by part of a step.

A run is profiled in its middle, where prompts are done and all that runs generates::

    step 0 ── prompts ── … ──│ some steps, profiled │── … to the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pagelab.bench.native_parts import NativePart, native_parts
from pagelab.bench.run import WorkloadRunner
from pagelab.errors import ReportError

if TYPE_CHECKING:
    import torch

    from pagelab.execution.native_runner import NativeRunner, Work

STEPS = {"cuda": 20, "cpu": 6}
"""Steps that are profiled by the kind of device, at most; of a shorter run, half of it. Reading
the events of one step on a CPU takes half a second."""

# the first part whose words a name has: a softmax of attention is attention
_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("inputs", ("_begin_", "_advance", "_apply")),
    ("attention", ("_decode", "_prefill", "_project", "attn", "attention", "flash", "fmha", "bmm")),
    (
        "sampling",
        (
            "_pick",
            "scan_logits",
            "weigh_levels",
            "gather_candidates",
            "draw_tokens",
            "sampl",
            "argmax",
            "topk",
            "top_k",
            "sort",
            "multinomial",
            "gumbel",
            "cumsum",
        ),
    ),
    ("norm", ("norm",)),
    ("activation", ("_gated", "_activate", "silu", "gelu")),
    (
        "linear",
        (
            "gemm",
            "gemv",
            "linear",
            "matmul",
            "addmm",
            "::mm",
            "nvjet",
            "cutlass",
            "xmma",
            "cublas",
            "splitk",
        ),
    ),
    ("copy", ("memcpy", "memset", "copy", "index", "scatter", "gather", "cat", "embedding")),
)
OTHER = "other"

# parts of the extension whose own name would say too little
_NATIVE_PARTS = {"head": "head_linear", "place": "rotary_copy", "embed": "embedding"}


class Operation(NamedTuple):
    """A kernel or an operation of the profiled steps, all its calls together."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """The profiled steps.

    Attributes:
        steps: how many.
        first: the first one's number.
        seconds: that they took together, the profiler's own cost included.
        of: `kernels` of a GPU, or `operations` of a CPU, whose own time is counted.
        operations: the longest first.
        trace: the file for Perfetto.
        native: the compiled extension's parts with what they had to do; empty where it did not run.
    """

    steps: int
    first: int
    seconds: float
    of: str
    operations: tuple[Operation, ...]
    trace: str
    native: tuple[NativePart, ...] = ()

    @property
    def parts(self) -> list[Operation]:
        """Sums by part of a step, the longest first; `idle` is what no operation accounts for.

        Kernels that overlap count in full each, so that nothing may be left as idle.
        """
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, seconds, calls in self.operations:
            entry = sums[part_of(name)]
            entry[0] += seconds
            entry[1] += calls
        parts = [Operation(name, s, int(n)) for name, (s, n) in sums.items()]
        idle = max(0.0, self.seconds - sum(part.seconds for part in parts))
        parts.sort(key=lambda part: -part.seconds)
        return [*parts, Operation("idle", idle, 0)]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        data = dataclasses.asdict(self)
        data["operations"] = [operation._asdict() for operation in self.operations]
        data["native"] = [part._asdict() for part in self.native]
        data["parts"] = [
            part._asdict() | {"share": part.seconds / self.seconds} for part in self.parts
        ]
        return data


def part_of(name: str) -> str:
    """The part of a step that a kernel or an operation belongs to, by its name."""
    lowered = name.lower()
    for part, words in _PARTS:
        if any(word in lowered for word in words):
            return part
    return OTHER


def profile_steps(
    runner: WorkloadRunner, device: torch.device, total_steps: int, path: Path
) -> StepProfile:
    """Run a workload to its end, with some steps in its middle profiled.

    Args:
        runner: at its beginning.
        device: of the engine.
        total_steps: that the workload takes, from a run before.
        path: where the trace goes: `.json`, or `.json.gz`.

    Raises:
        ReportError: the trace cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes its own starts and stops to stderr
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    steps = max(1, min(STEPS[device.type], total_steps // 2))
    first = (total_steps - steps) // 2
    with _cancelled_on_error(runner):
        while runner.steps < first and not runner.finished:
            runner.step()
        _wait(device)
        before, work = _native_seconds(runner), _native_work(runner)
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            first, done = runner.steps, 0
            while done < steps and not runner.finished:
                runner.step()
                done += 1
            _wait(device)
            seconds = time.perf_counter() - started
        after = _native_seconds(runner)
        native = _native_operations(before, after, done)
        parts: tuple[NativePart, ...] = ()
        if work is not None:
            own: NativeRunner = runner.core.runner  # type: ignore[assignment]
            took = {part: after[part] - before[part] for part in after}
            parts = native_parts(own, took, own.work.since(work))
        while not runner.finished:
            runner.step()
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise ReportError(f"--profile {path} cannot be written: {error}") from error
    return StepProfile(
        steps=done,
        first=first,
        seconds=seconds,
        of="kernels" if on_gpu else "operations",
        operations=tuple(native + _operations(profiler.key_averages(), on_gpu)),
        trace=str(path),
        native=parts,
    )


def _native_seconds(runner: WorkloadRunner) -> dict[str, float]:
    """What the compiled extension counts; empty where another runner runs."""
    count = getattr(runner.core.runner, "seconds_by_part", None)
    return {} if count is None else count()


def _native_work(runner: WorkloadRunner) -> Work | None:
    """A copy of what the extension's steps had to do so far; None where another runner runs."""
    work: Work | None = getattr(runner.core.runner, "work", None)
    return None if work is None else dataclasses.replace(work)


def _native_operations(
    before: dict[str, float], after: dict[str, float], steps: int
) -> list[Operation]:
    """One operation a part of the extension's steps, the longest first."""
    found = [
        Operation(f"pagelab::{_NATIVE_PARTS.get(part, part)}", after[part] - before[part], steps)
        for part in after
    ]
    return sorted(found, key=lambda operation: -operation.seconds)


def _operations(averages: Iterable[Any], on_gpu: bool) -> list[Operation]:
    """Those of the GPU or of the CPU, with the time that is theirs alone."""
    found = []
    for event in averages:
        if (event.device_type.name == "CUDA") != on_gpu:
            continue
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros > 0:
            found.append(Operation(event.key, micros / 1e6, event.count))
    return sorted(found, key=lambda operation: -operation.seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _cancelled_on_error(runner: WorkloadRunner) -> Iterator[None]:
    try:
        yield
    except BaseException:
        runner.cancel()
        raise
