"""Prometheus metrics. Names say what and in which unit; formulas are those of docs/metrics.md."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pagelab.engine.async_llm import AsyncLLM
from pagelab.engine.messages import BlockNews, EngineInfo, StepStats
from pagelab.engine.request_stream import RequestStream

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)


class ServerMetrics:
    """Everything that `/metrics` shows; an observer of the engine, with a registry of its own."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.registry = CollectorRegistry()
        self._recent: list[tuple[float, float, list[float]]] = []  # (end, TTFT, gaps)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"pagelab_{name}", text, buckets=buckets, registry=self.registry)

        self._ttft = histogram("ttft_seconds", "Arrival to first token.", _WAITS)
        self._itl = histogram("itl_seconds", "Every gap between two tokens of a sequence.", _GAPS)
        self._tpot = histogram("tpot_seconds", "(end-to-end - TTFT) / (n - 1) a request.", _GAPS)
        self._e2e = histogram("e2e_seconds", "Arrival to end.", _WAITS)
        self._queue = histogram("queue_seconds", "Arrival to the first step.", _WAITS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._output = histogram("request_output_tokens", "Tokens of all its answers.", _TOKENS)
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop is, asked 20 times a second.", _LAGS
        )
        self._requests = Counter(
            "pagelab_requests_ended", "Requests by their end.", ["end"], registry=self.registry
        )
        self._tokens = Counter(
            "pagelab_tokens", "Tokens of ended requests.", ["kind"], registry=self.registry
        )
        for end in ("stop", "length", "cancelled", "error", "lost", "refused"):
            self._requests.labels(end)
        for kind in ("prompt", "cached_prompt", "output"):
            self._tokens.labels(kind)
        self.registry.register(_EngineCollector(llm))

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)

    def stepped(self, stats: StepStats) -> None:
        """`Observer`: read when somebody asks."""

    def started(self, info: EngineInfo) -> None:
        """`Observer`."""

    def blocks_changed(self, news: BlockNews) -> None:
        """`Observer`."""

    def ended(self, stream: RequestStream) -> None:
        """Count a request and its times."""
        self._requests.labels(stream.outcome or "error").inc()
        if stream.outcome == "refused":
            return
        prompt, output = len(stream.prompt_token_ids), stream.num_output_tokens
        self._prompt.observe(prompt)
        self._output.observe(output)
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("output").inc(output)
        metrics = stream.metrics
        if metrics is None:
            return
        self._tokens.labels("cached_prompt").inc(metrics.num_cached_tokens)
        if metrics.first_scheduled_time is not None:
            self._queue.observe(metrics.first_scheduled_time - metrics.arrival_time)
        if stream.outcome not in ("stop", "length") or metrics.first_token_time is None:
            return
        ttft = metrics.first_token_time - metrics.arrival_time
        gaps = [after - before for before, after in pairwise(metrics.token_times)]
        self._ttft.observe(ttft)
        for gap in gaps:
            self._itl.observe(gap)
        if gaps:
            self._tpot.observe((metrics.token_times[-1] - metrics.token_times[0]) / len(gaps))
        if metrics.finish_time is not None:
            self._e2e.observe(metrics.finish_time - metrics.arrival_time)
        self._recent.append((time.monotonic(), ttft, gaps[-64:]))
        if len(self._recent) > 400:
            del self._recent[:200]

    def recent(self, seconds: float) -> tuple[list[float], list[float]]:
        """TTFTs and gaps of requests that ended within the last so many seconds."""
        since = time.monotonic() - seconds
        found = [entry for entry in self._recent if entry[0] >= since]
        return [ttft for _, ttft, _ in found], [gap for _, _, gaps in found for gap in gaps]


class _EngineCollector(Collector):
    """The engine's own figures, as of the moment when somebody asks."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        llm = self._llm
        state = GaugeMetricFamily("pagelab_engine_up", "1 while requests are served.")
        state.add_metric([], float(llm.state == "ready"))
        yield state
        restarts = CounterMetricFamily("pagelab_engine_restarts", "Engine processes that died.")
        restarts.add_metric([], llm.num_restarts)
        yield restarts
        if llm.stats is not None:
            yield from _of_stats(llm, llm.stats)


def _of_stats(llm: AsyncLLM, stats: StepStats) -> Iterator[Any]:
    ledger, info = stats.ledger, llm.info
    requests = GaugeMetricFamily("pagelab_sequences", "Sequences by state.", labels=["state"])
    requests.add_metric(["running"], stats.num_running)
    requests.add_metric(["waiting"], stats.num_waiting)
    yield requests
    open_requests = GaugeMetricFamily("pagelab_requests_open", "Requests that have not ended.")
    open_requests.add_metric([], llm.num_requests)
    yield open_requests
    slots = GaugeMetricFamily(
        "pagelab_kv_slots", "Slots of the KV pool by state; they add up to the pool.",
        labels=["state"],
    )  # fmt: skip
    for name in ("live", "unwritten", "cached", "free", "external"):
        slots.add_metric([name], getattr(ledger, name))
    yield slots
    saved = GaugeMetricFamily("pagelab_kv_slots_shared", "Slots that sharing blocks saves.")
    saved.add_metric([], ledger.shared_saved)
    yield saved
    pool = GaugeMetricFamily("pagelab_kv_bytes", "Bytes of K/V.", labels=["of"])
    slot_bytes = info.block_bytes / info.block_size
    pool.add_metric(["pool"], info.num_blocks * info.block_bytes)
    pool.add_metric(["live"], ledger.live * slot_bytes)
    yield pool
    for name, text, value in (
        ("engine_steps", "Steps of this engine process.", stats.step + 1),
        ("engine_step_seconds", "Seconds in steps, all told.", stats.steps_s),
        ("engine_runner_seconds", "Of these, seconds in the model.", stats.runner_s),
        ("engine_tokens", "Tokens computed, prompts and again included.", stats.total_tokens),
        ("preemptions", "Sequences that gave their blocks back.", stats.num_preemptions),
        ("recomputed_tokens", "Tokens computed again for that.", stats.recomputed_tokens),
        ("prefix_cache_queried_tokens", "Prompt tokens looked up.", stats.prefix_queried_tokens),
        ("prefix_cache_hit_tokens", "Prompt tokens found.", stats.prefix_hit_tokens),
    ):
        family = CounterMetricFamily(f"pagelab_{name}", text)
        family.add_metric([], value)
        yield family
