"""`results.json`: the record of one experiment. Every figure in a report comes from it.

The types below are the schema (version 2); `docs/results-schema.json` is generated from them and
`load_results` validates against them. Times are seconds, sizes bytes, KV amounts slots (one slot
holds one token's K/V in every layer), unless a name says otherwise.

::

    Results
    ├── environment            what it ran on (see `pagelab check --json`)
    ├── experiment             what was asked: model, budgets, block sizes, workloads, sampling
    ├── runs[]                 one per method, settings and repeat, each from its own process
    │   ├── startup, snapshots, memory
    │   └── workloads[]        one per workload
    │       ├── requests[]     tokens and times
    │       ├── steps          columns: the ledger, running, waiting, at every step
    │       └── block_events   who took and gave back which blocks, for the block map
    ├── summary[]              per label and workload: figures over the repeats
    ├── equality[]             greedy outputs against the reference method's
    └── analysis[]             findings computed from the figures above

A run is a cell of the grid: a method, an allocator and its settings. `label` names the cell, and
is unique. The **base cell** is the one whose axis is "budget" and whose settings are the
experiment's first values (`kv_memory_bytes`, `block_size`, `watermark`, `placement`); see
`is_base`. Two fair axes: "budget" (the same bytes for all: concurrency and speed differ) and
"batch" (the same number of requests at once for all: only the price of paging differs).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict  # noqa: UP035 (pydantic needs these before 3.12)

from pagelab.errors import ReportError

SCHEMA = "pagelab.results"
VERSION = 2

Status = Literal["ok", "failed", "unavailable", "interrupted"]
Phase = Literal["traditional", "paged"]
Axis = Literal["budget", "batch"]


class ModelInfo(TypedDict):
    """The model of an experiment."""

    name: str
    source: str  # where its files came from
    architecture: str
    num_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    kv_bytes_per_token: int  # in this experiment's dtype


SettingKey = Literal["kv_memory_bytes", "block_size", "watermark", "placement"]
SETTING_KEYS: tuple[SettingKey, ...] = ("kv_memory_bytes", "block_size", "watermark", "placement")
"""What a grid varies: fields of `RunSettings`, and of `ExperimentInfo` with the base's values."""

LedgerShare = Literal[
    "live", "reserved", "internal", "cached", "free", "external", "rounding", "shared_saved"
]
"""The shares of the pool in `LedgerSummary`."""


class RunSettings(TypedDict):
    """Where a run stands in the grid."""

    kv_memory_bytes: int
    block_size: int
    watermark: float
    placement: str  # buddy, first-fit: matters to contiguous allocators only
    max_num_seqs: int | None  # None: the scheduler's default


class Counts(TypedDict):
    """What became of the requests that a workload's source held."""

    read: int
    bad: int  # lines that could not be read, left out by --skip-bad
    dropped: int  # too long, left out
    clipped: int  # too long, cut
    left_out: NotRequired[int]  # entries that hold no request, such as a trace's failed ones
    first_bad: str | None  # what was wrong with the first bad line


class Objectives(TypedDict):
    """The stated service objectives; None: not stated."""

    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None


class RequestInfo(TypedDict):
    """One request as it was asked."""

    id: str
    prompt: str | None  # its text, shortened for display
    prompt_tokens: int
    max_tokens: int  # what it generates, exactly
    arrival_s: float  # after the workload's start
    asked_tokens: int | None  # what its client asked for at most, where that is more


class WorkloadInfo(TypedDict):
    """One workload as it was asked."""

    name: str  # prompts, mixed, sharegpt-like, azure_conv_2023, mixed@poisson:4, …
    title: str  # a sentence for people
    requests: list[RequestInfo]
    rate: str | None  # how requests arrive, as asked by --rate; None: the workload's own way
    counts: Counts | None  # None: its source leaves nothing out


class ExperimentInfo(TypedDict):
    """What was asked."""

    command: str  # the command line that repeats it
    model: ModelInfo
    device: NotRequired[str]  # as asked; a method's KVCapacity says which it was
    dtype: str
    kv_memory_bytes: int  # this and the next three: the base cell's, the first of the lists below
    block_size: int
    watermark: float
    placement: str
    kv_memories: list[int]
    block_sizes: list[int]
    watermarks: list[float]
    placements: list[str]
    batch: int | None  # requests at once on the same-batch axis; None: that axis was not run
    max_model_len: int
    max_num_batched_tokens: int
    repeats: int
    seed: int
    threads: int
    sampling: str  # "greedy, end-of-sequence ignored"
    temperature: float
    objectives: Objectives
    cost_model: str | None  # of simulated runs
    workloads: list[WorkloadInfo]


class Startup(TypedDict):
    """Where the time before the first measured request went."""

    import_s: float
    load_s: float
    warmup_s: float


class KVCapacity(TypedDict):
    """What a method made of the KV budget."""

    bytes: int  # K/V bytes it may hold or has allocated
    slots: int
    num_blocks: int | None  # None: the method has no blocks
    block_size: int | None
    device: NotRequired[str]  # where: cpu, cuda:0
    note: str  # e.g. "2 rows of 2048 slots", "grows by concatenation"


class Snapshot(TypedDict):
    """Memory at a named stage."""

    label: str  # start, model loaded, warmed up, mixed: request 3 done, mixed: batch complete
    t: float
    rss_bytes: int  # of the method's process and its children
    device_bytes: int | None  # NVML per process, or torch's allocator; None without a GPU
    kv_allocated_bytes: int  # slots in allocations, in bytes
    kv_live_bytes: int  # slots that hold a token's K/V, in bytes


class MemorySamples(TypedDict):
    """Memory by continuous sampling from outside, columns."""

    t: list[float]
    rss_bytes: list[int]
    device_bytes: list[int] | None
    source: str  # "psutil, children included", "NVML per process", …


class RequestResult(TypedDict):
    """One request as it went. Times count from the workload's start."""

    id: str
    output_token_ids: list[int]
    finish_reason: str  # stop, length, cancelled, error
    error: NotRequired[str]
    arrival_s: float
    first_scheduled_s: float
    first_token_s: float
    finish_s: float
    token_times_s: list[float]
    cached_tokens: int
    preemptions: int
    recomputed_tokens: int


class Steps(TypedDict):
    """Columns over the steps of a workload, one entry a step; slots add up to the capacity.

    live + reserved + internal + cached + free + external == pool
    """

    t: list[float]  # at the end of the step
    new_tokens: list[int]
    running: list[int]
    waiting: list[int]
    live: list[int]
    reserved: list[int]  # unwritten, and written before its allocation was released
    internal: list[int]  # unwritten, and never written
    cached: list[int]
    free: list[int]
    external: list[int]
    shared_saved: list[int]  # slots that sharing saves; not part of the sum
    rounding: list[int]  # of `external`: lost to rounding a range up; not part of the sum


class LedgerSummary(TypedDict):
    """Shares of the pool (0..1), weighted by time, while requests were running."""

    live: float
    reserved: float
    internal: float
    cached: float
    free: float
    external: float
    rounding: float  # of `external`: lost to rounding a range up; not part of the sum
    shared_saved: float  # what sharing saves; not part of the sum
    mean_running: float
    peak_running: int
    peak_live_slots: int
    peak_allocated_slots: int


class Preemption(TypedDict):
    """A running request that gave its blocks back."""

    step: int
    request: str
    tokens: int  # computed tokens whose blocks it gave back (the prefix cache may keep some)


class WorkloadRun(TypedDict):
    """One workload under one method."""

    name: str
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests: list[RequestResult]
    steps: Steps
    ledger: LedgerSummary
    # [step, block_id, holder]: from this step on the block is held by request index `holder`
    # (into requests), -1: free, -2: cached. Everything is free before the first event.
    block_events: list[tuple[int, int, int]]
    preemptions: list[Preemption]
    num_preemptions: int
    recomputed_tokens: int  # computed again after a preemption
    prefix_queries: int  # tokens looked up
    prefix_hits: int


class MethodRun(TypedDict):
    """One method with its settings, once, in a process of its own."""

    method: str  # hf-generate, hf-static, hf-continuous-batching, vllm, pagelab
    # names the cell: "hf-generate", "pagelab paged", "pagelab paged, 64 MiB, block 8",
    # "pagelab contiguous-max, first-fit", "pagelab paged, batch 2"
    label: str
    phase: Phase
    allocator: str | None
    axis: Axis
    settings: RunSettings
    simulated: bool  # by a cost model, under a virtual clock
    repeat: int
    status: Status
    reason: str | None  # why not ok, for people
    pid: int | None
    startup: Startup | None
    kv: KVCapacity | None
    snapshots: list[Snapshot]
    memory: MemorySamples | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    workloads: list[WorkloadRun]


class Spread(TypedDict):
    """A figure over the repeats."""

    median: float
    min: float
    max: float


class Summary(TypedDict):
    """One cell on one workload, over its repeats. Formulas: docs/metrics.md."""

    label: str
    workload: str
    axis: Axis
    settings: RunSettings
    simulated: bool
    repeats: int
    duration_s: Spread
    output_tokens_per_s: Spread
    ttft_mean_s: Spread
    ttft_p95_s: Spread
    itl_mean_s: Spread
    itl_p95_s: Spread
    tpot_mean_s: Spread
    e2e_mean_s: Spread
    mean_running: Spread
    peak_rss_bytes: Spread
    live_share: Spread  # of the pool, time-weighted
    goodput_per_s: Spread | None  # requests/s that meet every objective; None: none is stated
    recomputed_per_output_token: Spread
    num_preemptions: Spread


class Difference(TypedDict):
    """Where a request's output first differs from the reference's."""

    request: str
    position: int
    reference_token: int | None
    token: int | None


class Equality(TypedDict):
    """Greedy outputs of one method against the reference method's."""

    workload: str
    reference: str
    label: str
    equal: int
    total: int
    differences: list[Difference]


class Finding(TypedDict):
    """A conclusion, computed: the figures that it rests on are beside it."""

    workload: str | None
    verdict: Literal["better", "worse", "same", "info"]  # paging against what it is compared with
    text: str
    figures: dict[str, float]


class Results(TypedDict):
    """The whole file."""

    schema: str
    version: int
    created: str  # ISO 8601
    pagelab_version: str
    complete: bool
    note: str | None  # why it is not complete
    environment: dict[str, Any]
    experiment: ExperimentInfo
    runs: list[MethodRun]
    summary: list[Summary]
    equality: list[Equality]
    analysis: list[Finding]


def is_base(
    run: MethodRun | Summary, experiment: ExperimentInfo, *, but: SettingKey | None = None
) -> bool:
    """True for a run (or its summary) of the base cell: the one that charts show first.

    With `but`, also for those that differ from it in that setting alone: a sweep's.
    """
    settings = run["settings"]
    return run["axis"] == "budget" and all(
        key == but or settings[key] == experiment[key] for key in SETTING_KEYS
    )


def load_results(path: Path) -> Results:
    """Read and validate a results file.

    Raises:
        ReportError: it cannot be read, is not a results file, or is of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ReportError(f"{path} is not a results file of `pagelab compare`")
    if data.get("version") != VERSION:
        raise ReportError(
            f"{path} has version {data.get('version')} of the results schema; "
            f"this PageLab reads version {VERSION}"
        )
    from pydantic import TypeAdapter, ValidationError  # slow to import, needed only here

    try:
        return TypeAdapter(Results).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ReportError(f"{path} is damaged at {where}: {first['msg']}") from error


def write_text_safely(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary one beside it, then renamed.

    Raises:
        ReportError: it cannot be written; names the path and the reason (a full disk, say).
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ReportError(f"cannot write {path}: {error.strerror}") from error


def save_results(results: Results, path: Path) -> None:
    """Write a results file.

    Raises:
        ReportError: it cannot be written.
    """
    write_text_safely(path, json.dumps(results, separators=(",", ":"), allow_nan=False) + "\n")


def schema() -> dict[str, Any]:
    """The JSON Schema of a results file (`docs/results-schema.json`)."""
    from pydantic import TypeAdapter

    return TypeAdapter(Results).json_schema()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
