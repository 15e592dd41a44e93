"""The parent's end of one method: start it, listen, sample its memory, and end it in any case."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pagelab.config import format_bytes
from pagelab.errors import ReportError
from pagelab.lab.events import (
    CapacityReported,
    Event,
    ProgressMade,
    StageReached,
    WorkloadFinished,
)
from pagelab.lab.methods import Variant
from pagelab.lab.protocol import PROTOCOL, Job, parse_event, prepare_to_parse
from pagelab.lab.protocol import Event as Message
from pagelab.lab.protocol import Stage as StageMessage
from pagelab.lab.validate import problem_with
from pagelab.results import MethodRun, Snapshot, Status
from pagelab.telemetry import MemorySampler

WORKER = (sys.executable, "-m", "pagelab.lab.worker")
TAIL_LINES = 12
_GRACE_S = 5.0  # between asking a child to end and killing it


@dataclass(frozen=True, slots=True)
class _Received:
    """A message with what was true when it came."""

    message: Message
    t: float
    rss_bytes: int
    device_bytes: int | None


@dataclass(slots=True)
class _Ending:
    """How a run ended; unknown until it did."""

    status: Status | None = None
    reason: str | None = None
    own_peak: int | None = None
    ignored: list[str] = field(default_factory=list)


def run_method(
    job: Job,
    variant: Variant,
    repeat: int,
    *,
    log_path: Path,
    on_event: Callable[[Event], None],
    silence_timeout_s: float = 900.0,
    sample_every_s: float = 0.05,
    command: Sequence[str] = WORKER,
) -> MethodRun:
    """Run one method once, in a process of its own, and return whatever came of it.

    A child that fails, dies or falls silent for `silence_timeout_s` gives a run that says so,
    with the workloads that it had finished. Ctrl-C ends the child and gives a run with status
    `interrupted`.

    Raises:
        ReportError: the log file cannot be written.
    """
    run = empty_run(job, variant, repeat)
    ending = _Ending()
    log = _open_log(log_path)
    with log:
        child = _Child(command, job, log, sample_every_s)
        run["pid"] = child.pid
        try:
            _listen(child, run, ending, job, on_event, silence_timeout_s)
        except KeyboardInterrupt:
            ending.status, ending.reason = "interrupted", "Ctrl-C"
        finally:
            try:
                child.end(ask=ending.status != "ok")
            except KeyboardInterrupt:  # pressed again while it was ending
                child.kill()
                ending.status, ending.reason = "interrupted", "Ctrl-C"
    if ending.status is None:
        ending.status = "failed"
        ending.reason = _why_it_died(child, log_path)
    run["status"], run["reason"] = ending.status, ending.reason
    run["memory"] = child.sampler.columns()
    seen = [child.sampler.peak_rss_bytes or 0, ending.own_peak or 0]
    run["peak_rss_bytes"] = max(seen) or None
    devices = [s["device_bytes"] for s in run["snapshots"] if s["device_bytes"] is not None]
    run["peak_device_bytes"] = max([*devices, child.sampler.peak_device_bytes or 0], default=0)
    if not devices and child.sampler.peak_device_bytes is None:
        run["peak_device_bytes"] = None
    return run


def empty_run(job: Job, variant: Variant, repeat: int) -> MethodRun:
    """A run of which nothing is known yet."""
    return {
        "method": variant.method,
        "label": variant.label,
        "phase": variant.phase,
        "allocator": variant.allocator_name,
        "axis": variant.axis,
        "settings": job.settings(),
        "simulated": False,
        "repeat": repeat,
        "status": "failed",
        "reason": None,
        "pid": None,
        "startup": None,
        "kv": None,
        "snapshots": [],
        "memory": None,
        "peak_rss_bytes": None,
        "peak_device_bytes": None,
        "workloads": [],
    }


def _listen(
    child: _Child,
    run: MethodRun,
    ending: _Ending,
    job: Job,
    on_event: Callable[[Event], None],
    silence_timeout_s: float,
) -> None:
    """Take messages until the child's stdout ends, it says that it is done, or it is silent."""
    asked = list(job.workloads)
    while ending.status is None:
        try:
            received = child.messages.get(timeout=silence_timeout_s)
        except queue.Empty:
            ending.status = "failed"
            ending.reason = f"silent for {silence_timeout_s:g} s: stopped"
            return
        if received is None:
            return
        message = received.message
        if message["event"] == "hello":
            if message["protocol"] != PROTOCOL:
                ending.status = "failed"
                ending.reason = f"it speaks protocol {message['protocol']}, not {PROTOCOL}"
        elif message["event"] == "stage":
            snapshot = _snapshot(message, received)
            run["snapshots"].append(snapshot)
            on_event(StageReached(run["label"], run["repeat"], snapshot))
        elif message["event"] == "kv":
            run["kv"] = message["capacity"]
            on_event(CapacityReported(run["label"], message["capacity"]))
        elif message["event"] == "progress":
            on_event(
                ProgressMade(run["label"], message["workload"], message["done"], message["total"])
            )
        elif message["event"] == "workload":
            problem = (
                problem_with(message["run"], run["kv"], asked.pop(0))
                if asked
                else "it delivered more workloads than it was asked for"
            )
            if problem is not None:
                ending.status, ending.reason = "failed", f"its results are wrong: {problem}"
                return
            run["workloads"].append(message["run"])
            on_event(WorkloadFinished(run["label"], run["repeat"], message["run"]))
        elif message["event"] == "done":
            run["startup"], ending.own_peak = message["startup"], message["peak_rss_bytes"]
            missing = ", ".join(workload.name for workload in asked)
            ending.status = "failed" if asked else "ok"
            ending.reason = f"it ended without results for {missing}" if asked else None
        else:
            ending.status, ending.reason = message["kind"], message["message"]


def _snapshot(message: StageMessage, received: _Received) -> Snapshot:
    device = received.device_bytes
    return {
        "label": message["label"],
        "t": received.t,
        "rss_bytes": received.rss_bytes,
        "device_bytes": message["device_bytes"] if device is None else device,
        "kv_allocated_bytes": message["kv_allocated_bytes"],
        "kv_live_bytes": message["kv_live_bytes"],
    }


class _Child:
    """The process of a method, the thread that reads it and the one that samples its memory."""

    def __init__(
        self, command: Sequence[str], job: Job, log: IO[str], sample_every_s: float
    ) -> None:
        self._log = log
        prepare_to_parse()  # otherwise the first snapshots would wait for it
        self._started = time.time()
        # a session of its own: Ctrl-C in the terminal reaches the parent only, which decides
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(job.threads),
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
        self.pid = self._process.pid
        self.killed = False
        self.sampler = MemorySampler(self.pid, sample_every_s, self._started)
        self.messages: queue.Queue[_Received | None] = queue.Queue()
        self.sampler.start()
        self._reader = threading.Thread(target=self._read, name="method-reader", daemon=True)
        self._reader.start()
        with contextlib.suppress(OSError):  # it may be dead already: its exit code tells
            assert self._process.stdin is not None
            self._process.stdin.write(job.to_line())
            self._process.stdin.flush()

    @property
    def exit_code(self) -> int | None:
        """Negative: ended by that signal. None: it could not be waited for."""
        return self._process.returncode

    def end(self, *, ask: bool) -> None:
        """Let it go, or ask it to go where it may still be at work; in the end make it go."""
        try:
            if ask and self._reader.is_alive():
                self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it and its children now, and close everything."""
        self.killed = self._process.poll() is None
        self._signal(signal.SIGKILL)  # children of a method that ended are not left behind
        self._process.wait()
        self.sampler.stop()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._reader.join(timeout=_GRACE_S)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.strip():
                continue
            try:
                message = parse_event(line)
            except ValueError as error:
                # a library that found the real stdout, say; the log keeps it
                with contextlib.suppress(ValueError, OSError):
                    self._log.write(f"[not an event: {error}] {line}")
                    self._log.flush()
                continue
            t, rss, device = 0.0, 0, None
            if message["event"] == "stage":
                t, rss, device = self.sampler.sample()
                t = max(0.0, round(message["t"] - self._started, 4))
            self.messages.put(_Received(message, t, rss, device))
        self.messages.put(None)


def _environment(threads: int) -> dict[str, str]:
    """The child's environment: the same threads for every method, no foreign chatter."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _open_log(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from error


def _why_it_died(child: _Child, log_path: Path) -> str:
    code = child.exit_code
    if child.killed:
        why = "closed its output without a result and did not end: stopped"
    elif code is not None and code < 0:
        peak = format_bytes(child.sampler.peak_rss_bytes or 0)
        why = f"ended by {_signal_name(-code)} with at most {peak} resident"
        if -code == signal.SIGKILL:
            why += "; the system does that when memory runs out"
    else:
        why = f"ended without a result (exit code {code})"
    tail = log_tail(log_path)
    return f"{why}. The end of {log_path}:\n{tail}" if tail else f"{why}, {log_path} is empty"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def log_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file; empty if it has none or cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
