"""The last minutes of the page map as a results file, which `pagelab report` shows with its slider.

A look at the blocks is a step of the recording; between two looks nothing is known. Kept while
somebody looks at the page, for `KEPT_S` seconds::

    dropped looks │ look │ look │ look │ … │ look        (t: the engine's clock)
       └▶ base ───┘ the holders before the first look that is kept
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pagelab import __version__
from pagelab.engine.messages import BlockNews, EngineInfo, RequestRow
from pagelab.engine.request_stream import RequestStream
from pagelab.engine.workload_record import empty_steps, micro, summarize_ledger
from pagelab.memory.ledger import FREE
from pagelab.metrics import output_rate, summarize
from pagelab.results import (
    SCHEMA,
    VERSION,
    ExperimentInfo,
    MethodRun,
    RequestInfo,
    RequestResult,
    Results,
    RunSettings,
    Steps,
    WorkloadRun,
)
from pagelab.types import RequestMetrics

KEPT_S = 300.0
MOST_LOOKS = 2000

NOTE = (
    "A recording of a server's page map, a step for each look at the blocks (about five a second). "
    "Token ids were not recorded (they are 0), and unwritten slots all count as reserved. "
    "Of the model only its name, vocabulary and K/V bytes a token are known: parameters, layers, "
    "heads and threads stand as 0; seed, temperature, watermark and placement are placeholders."
)


@dataclass(slots=True)
class _Seen:
    """A request as the looks saw it. Times are the engine's clock."""

    id: str
    prompt_tokens: int = 0
    max_tokens: int = 1
    arrival: float | None = None
    cached: int = 0
    preemptions: int = 0
    tokens: int = 0
    token_times: list[float] = field(default_factory=list)
    last_seen: float = 0.0
    end: str | None = None
    metrics: RequestMetrics | None = None


class Recording:
    """Follows the page map's news."""

    def __init__(self) -> None:
        self._looks: deque[BlockNews] = deque()
        self._base: dict[int, int] = {}  # block → holder, before the looks that are kept
        self._seen: dict[int, _Seen] = {}  # by the holder's number
        self._numbers: dict[str, int] = {}

    def clear(self) -> None:
        """Begin anew: another engine, or nobody has looked for a while."""
        self._looks.clear()
        self._base.clear()
        self._seen.clear()
        self._numbers.clear()

    def add(self, news: BlockNews) -> None:
        """Take a look in."""
        if news.everything:
            self.clear()
        self._looks.append(news)
        for row in news.rows:
            self._note(row, news.stats.time)
        since = news.stats.time - KEPT_S
        while len(self._looks) > MOST_LOOKS or self._looks[0].stats.time < since:
            for block, holder, _, _ in self._looks.popleft().blocks:
                self._base[block] = holder
        if len(self._seen) > 4 * MOST_LOOKS:
            self._seen = {n: seen for n, seen in self._seen.items() if seen.last_seen >= since}
            self._numbers = {seen.id: number for number, seen in self._seen.items()}

    def ended(self, stream: RequestStream) -> None:
        """A request has ended: now its times are known exactly."""
        number = self._numbers.get(stream.id)
        if number is not None:
            self._seen[number].end = stream.outcome
            self._seen[number].metrics = stream.metrics

    def results(self, info: EngineInfo, environment: dict[str, Any]) -> Results | None:
        """The recording; None while nothing was recorded."""
        if len(self._looks) < 2:
            return None
        run = self._run(info)
        experiment = self._experiment(info, run)
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pagelab_version": __version__,
            "complete": True,
            "note": NOTE,
            "environment": environment,
            "experiment": experiment,
            "runs": [run],
            "summary": summarize([run]),
            "equality": [],
            "analysis": [],
        }

    def _note(self, row: RequestRow, now: float) -> None:
        seen = self._seen.get(row.number)
        if seen is None:
            seen = self._seen[row.number] = _Seen(row.request_id)
            self._numbers[row.request_id] = row.number
            seen.tokens = 0 if row.sample else row.output_tokens
        seen.last_seen = now
        if row.sample == 0:
            seen.prompt_tokens, seen.max_tokens = row.prompt_tokens, row.max_tokens
            seen.arrival, seen.cached = row.arrival_time, row.cached_tokens
            seen.preemptions = row.preemptions
            seen.token_times += [now] * (row.output_tokens - seen.tokens)
            seen.tokens = row.output_tokens

    def _run(self, info: EngineInfo) -> MethodRun:
        started, ended = self._looks[0].stats.time, self._looks[-1].stats.time
        pool = info.num_blocks * info.block_size
        steps = self._steps()
        holders: dict[int, int] = {}  # a holder's number → index of its request
        events = list(self._events(holders))
        requests = [self._request(number, started, ended) for number in holders]
        output = sum(len(request["output_token_ids"]) for request in requests)
        first, last = self._looks[0].stats, self._looks[-1].stats
        workload: WorkloadRun = {
            "name": "recording",
            "duration_s": ended - started,
            "prompt_tokens": sum(self._of(number).prompt_tokens for number in holders),
            "output_tokens": output,
            "output_tokens_per_s": output_rate(output, ended - started),
            "requests": requests,
            "steps": steps,
            "ledger": summarize_ledger(steps, pool),
            "block_events": events,
            "preemptions": [],
            "num_preemptions": last.num_preemptions - first.num_preemptions,
            "recomputed_tokens": last.recomputed_tokens - first.recomputed_tokens,
            "prefix_queries": last.prefix_queried_tokens - first.prefix_queried_tokens,
            "prefix_hits": last.prefix_hit_tokens - first.prefix_hit_tokens,
        }
        return {
            "method": "pagelab",
            "label": f"pagelab {info.allocator}",
            "phase": "traditional" if info.allocator.startswith("contiguous") else "paged",
            "allocator": info.allocator,
            "axis": "budget",
            "settings": _settings(info),
            "simulated": False,
            "repeat": 0,
            "status": "ok",
            "reason": None,
            "pid": info.pid,
            "startup": None,
            "kv": {
                "bytes": info.num_blocks * info.block_bytes,
                "slots": pool,
                "num_blocks": info.num_blocks,
                "block_size": info.block_size,
                "device": info.device,
                "note": "",
            },
            "snapshots": [],
            "memory": None,
            "peak_rss_bytes": None,
            "peak_device_bytes": None,
            "workloads": [workload],
        }

    def _steps(self) -> Steps:
        steps = empty_steps()
        started = self._looks[0].stats.time
        before = self._looks[0].stats.total_tokens
        for look in self._looks:
            stats, ledger = look.stats, look.stats.ledger
            steps["t"].append(micro(stats.time - started))
            steps["new_tokens"].append(stats.total_tokens - before)
            before = stats.total_tokens
            steps["running"].append(stats.num_running)
            steps["waiting"].append(stats.num_waiting)
            steps["live"].append(ledger.live)
            steps["reserved"].append(ledger.unwritten)
            steps["internal"].append(0)
            steps["cached"].append(ledger.cached)
            steps["free"].append(ledger.free)
            steps["external"].append(ledger.external)
            steps["rounding"].append(ledger.rounding)
            steps["shared_saved"].append(ledger.shared_saved)
        return steps

    def _events(self, indices: dict[int, int]) -> Iterator[tuple[int, int, int]]:
        """Changes of holders, as results have them; numbers get an index when they first come."""

        def index(holder: int) -> int:
            return holder if holder < 0 else indices.setdefault(holder, len(indices))

        holders = dict(self._base)
        changes = {block: holder for block, holder in holders.items() if holder != FREE}
        for step, look in enumerate(self._looks):
            for block, holder, _, _ in look.blocks:
                if holders.get(block, FREE) != holder:
                    holders[block] = changes[block] = holder
            yield from ((step, block, index(holder)) for block, holder in changes.items())
            changes = {}

    def _of(self, number: int) -> _Seen:
        return self._seen.get(number) or _Seen(f"request {number}")

    def _request(self, number: int, started: float, ended: float) -> RequestResult:
        seen, metrics = self._of(number), self._of(number).metrics

        def since(moment: float | None, otherwise: float) -> float:
            return micro(max(0.0, (otherwise if moment is None else moment) - started))

        times = metrics.token_times if metrics is not None else seen.token_times
        times = [moment for moment in times if started <= moment <= ended]
        arrival = seen.arrival if seen.arrival is not None else started
        first = times[0] if times else ended
        finish = metrics.finish_time if metrics is not None else seen.last_seen or ended
        return {
            "id": seen.id,
            "output_token_ids": [0] * len(times),
            "finish_reason": seen.end if seen.end in ("stop", "length", "error") else "cancelled",
            "arrival_s": since(arrival, started),
            "first_scheduled_s": since(metrics.first_scheduled_time if metrics else None, arrival),
            "first_token_s": since(first, ended),
            "finish_s": since(finish, ended),
            "token_times_s": [since(moment, ended) for moment in times],
            "cached_tokens": seen.cached,
            "preemptions": seen.preemptions,
            "recomputed_tokens": metrics.num_recomputed_tokens if metrics is not None else 0,
        }

    def _experiment(self, info: EngineInfo, run: MethodRun) -> ExperimentInfo:
        by_id = {seen.id: seen for seen in self._seen.values()}
        asked: list[RequestInfo] = []
        for request in run["workloads"][0]["requests"]:
            seen = by_id.get(request["id"]) or _Seen(request["id"])
            asked.append(
                {
                    "id": seen.id,
                    "prompt": None,
                    "prompt_tokens": seen.prompt_tokens,
                    "max_tokens": seen.max_tokens,
                    "arrival_s": request["arrival_s"],
                    "asked_tokens": None,
                }
            )
        settings = run["settings"]
        return {
            "command": "pagelab serve",
            "model": {
                "name": info.model,
                "source": "a server",
                "architecture": "",
                "num_parameters": 0,
                "num_layers": 0,
                "num_heads": 0,
                "num_kv_heads": 0,
                "head_dim": 0,
                "vocab_size": info.vocab_size,
                "kv_bytes_per_token": info.block_bytes // info.block_size,
            },
            "device": info.device,
            "dtype": info.dtype,
            "kv_memory_bytes": settings["kv_memory_bytes"],
            "block_size": info.block_size,
            "watermark": settings["watermark"],
            "placement": settings["placement"],
            "kv_memories": [settings["kv_memory_bytes"]],
            "block_sizes": [info.block_size],
            "watermarks": [settings["watermark"]],
            "placements": [settings["placement"]],
            "batch": None,
            "max_model_len": info.max_model_len,
            "max_num_batched_tokens": info.max_num_batched_tokens,
            "repeats": 1,
            "seed": 0,
            "threads": 0,
            "sampling": "as each client asked",
            "temperature": 0.0,
            "objectives": {"ttft_s": None, "tpot_s": None, "e2e_s": None},
            "cost_model": None,
            "workloads": [
                {
                    "name": "recording",
                    "title": "what clients asked while the page map was open",
                    "requests": asked,
                    "rate": None,
                    "counts": None,
                }
            ],
        }


def _settings(info: EngineInfo) -> RunSettings:
    return {
        "kv_memory_bytes": info.num_blocks * info.block_bytes,
        "block_size": info.block_size,
        "watermark": 0.05,
        "placement": "buddy",
        "max_num_seqs": info.max_num_seqs,
    }
