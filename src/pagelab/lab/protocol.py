"""How the experiment talks to a method in a process of its own: JSON lines.

::

    parent (lab.process)                                      child (lab.worker)
      │  python -m pagelab.lab.worker
      │ ── stdin: ONE line, the job ────────────────────────────▶ │
      │ ◀─ stdout: one event a line ─────────────────────────────  │
      │      hello     pid, protocol, versions                     │
      │      stage     "start"                                     │
      │      stage     "model loaded"         ┐ label, time, K/V   │  Method.setup
      │      kv        KVCapacity             │ bytes; the parent  │
      │      stage     "warmed up"            │ adds RSS and GPU   │  Method.warm_up
      │      progress  tokens done, in all    │ bytes on receipt   │  ┐
      │      stage     "mixed: request 3 done"┘                    │  │ Method.run, for each
      │      workload  a whole WorkloadRun                         │  ┘ workload
      │      done      start-up times, the kernel's peak RSS       │
      │   or error     failed | unavailable, a sentence for people │
      │                                                            │
      │ ── stdin closes: the parent is gone, the child exits ────▶ │

The child's real stdout carries events only: before it imports a method, the worker points file
descriptor 1 at stderr, so that no library's print can get between them. stderr goes to a log
file, whose tail is shown when a method dies without a word.

To add a method, write a `Method` (`pagelab.lab.methods.base`): `setup`, `warm_up`, `run`. Put it
into `pagelab.lab.methods.METHODS`, or name it as `module:Class`. A program that is not Python can
speak the protocol itself.

Exit codes: 0 done, 1 failed, 2 the job could not be read, 3 unavailable here, 4 the parent is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TextIO, cast

from typing_extensions import TypedDict

from pagelab.results import KVCapacity, RunSettings, Startup, WorkloadRun
from pagelab.workloads import Workload

PROTOCOL = 2

EXIT_FAILED = 1
EXIT_BAD_JOB = 2
EXIT_UNAVAILABLE = 3
EXIT_ORPHANED = 4


class MethodUnavailableError(Exception):
    """A method cannot run here, or not with these settings; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a method is told.

    Methods of one cell of the grid are told the same, but for `method` and `allocator`. Every
    method generates exactly each request's `max_tokens`, end-of-sequence ignored.

    Attributes:
        method: its name, or `module:Class`.
        allocator: of the method `pagelab`: a name, `module:Class` or `file.py:Class`.
        model: None for the default model.
        dtype: of weights, activations and K/V.
        kv_memory: bytes for K/V.
        block_size: slots a block, for methods with blocks.
        max_model_len: tokens a request may reach.
        max_num_batched_tokens: the token budget of a step, for methods that have one.
        watermark: share of the blocks that an admission must leave free.
        threads: of the CPU.
        seed: of sampling.
        warm_up: what to run before anything is measured.
        workloads: what to run.
        placement: where contiguous ranges go.
        max_num_seqs: requests at once at most; None: the method's default.
        temperature: 0 is greedy.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        debug: tracebacks of expected errors go to the log.
    """

    method: str
    allocator: str | None
    model: str | None
    dtype: str
    kv_memory: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    watermark: float
    threads: int
    seed: int
    warm_up: Workload
    workloads: tuple[Workload, ...]
    placement: str = "buddy"
    max_num_seqs: int | None = None
    temperature: float = 0.0
    device: str = "cpu"
    debug: bool = False

    def settings(self) -> RunSettings:
        """Where its run stands in the grid."""
        return {
            "kv_memory_bytes": self.kv_memory,
            "block_size": self.block_size,
            "watermark": self.watermark,
            "placement": self.placement,
            "max_num_seqs": self.max_num_seqs,
        }

    def to_line(self) -> str:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Job:
        """From what `to_line` gave.

        Raises:
            ValueError: the line is no job.
        """
        try:
            data = json.loads(line)
            data["warm_up"] = Workload.from_json(data["warm_up"])
            data["workloads"] = tuple(Workload.from_json(item) for item in data["workloads"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a job: {error}") from error


class Hello(TypedDict):
    """The first event."""

    event: Literal["hello"]
    protocol: int
    pid: int
    versions: dict[str, str]


class Stage(TypedDict):
    """Memory as the method sees it, at a named moment."""

    event: Literal["stage"]
    label: str
    t: float  # time.time()
    kv_allocated_bytes: int
    kv_live_bytes: int
    device_bytes: int | None  # by torch's allocator; NVML's figure is preferred


class Progress(TypedDict):
    """Output tokens of a workload that are done."""

    event: Literal["progress"]
    workload: str
    done: int
    total: int


class Kv(TypedDict):
    """What the method made of the KV budget."""

    event: Literal["kv"]
    capacity: KVCapacity


class WorkloadDone(TypedDict):
    """One finished workload, whole."""

    event: Literal["workload"]
    run: WorkloadRun


class Done(TypedDict):
    """The last event of a method that did everything."""

    event: Literal["done"]
    startup: Startup
    peak_rss_bytes: int | None  # of the child alone, by the kernel


class Error(TypedDict):
    """The last event of a method that could not."""

    event: Literal["error"]
    kind: Literal["failed", "unavailable"]
    message: str


Event = Hello | Stage | Progress | Kv | WorkloadDone | Done | Error


@cache
def _adapter() -> Any:
    from typing import Annotated

    from pydantic import Field, TypeAdapter  # only the parent needs it

    return TypeAdapter(Annotated[Event, Field(discriminator="event")])


def prepare_to_parse() -> None:
    """Load what `parse_event` needs (0.2 s), before there is anything to parse."""
    _adapter()


def parse_event(line: str) -> Event:
    """Read an event.

    Raises:
        ValueError: the line is not one; says where.
    """
    from pydantic import ValidationError

    try:
        return cast("Event", _adapter().validate_json(line))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the line"
        raise ValueError(f"{where}: {first['msg']}") from error


class Channel:
    """The child's end: events to the parent."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Write one event, whole and at once. NaN and infinity are bugs of the method."""
        line = json.dumps(event, separators=(",", ":"), allow_nan=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()


def take_stdout() -> Channel:
    """Keep the real stdout for events, and send whatever else is printed to stderr."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    return Channel(os.fdopen(real, "w", encoding="utf-8"))


class Parent:
    """The child's other end: the job, and the news that the parent is gone."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._left = b""
        self._over = threading.Event()

    def read_line(self) -> str:
        """The job's line; raw reads, so that no buffer's lock is held when Python exits."""
        while b"\n" not in self._left:
            chunk = os.read(self._descriptor, 1 << 16)
            if not chunk:
                break
            self._left += chunk
        line, _, self._left = self._left.partition(b"\n")
        return line.decode("utf-8")

    def watch(self) -> None:
        """Exit when the parent does: a killed parent must not leave a model in memory."""
        threading.Thread(target=self._wait_for_end, name="parent-watch", daemon=True).start()

    def finished(self) -> None:
        """The work is done: the parent may go now."""
        self._over.set()

    def _wait_for_end(self) -> None:
        while os.read(self._descriptor, 1 << 12):
            pass
        if not self._over.is_set():
            os._exit(EXIT_ORPHANED)
