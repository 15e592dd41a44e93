"""The load itself: requests at their times, whatever has become of those before (open loop).

::

    --rate 4          a       a a     a   …    arrivals do not wait for answers
    --concurrency 8   as soon as one of eight ends, the next begins (closed loop)

An open loop shows what waits: a server that is too slow gets a queue, as it would from people, and
TTFT counts from the moment when the request was due.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagelab.bench.serve_client import Endpoint, HttpError, stream_events


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What is asked: a prompt (text or token ids), tokens to generate, seconds after the start."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    arrival_s: float


@dataclass(slots=True)
class Served:
    """What became of one request; times in seconds after the start."""

    due_s: float
    sent_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)  # of chunks with text
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0  # where the server does not say: chunks with text
    has_usage: bool = False  # whether it said
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From when it was due to its first text."""
        return self.chunk_times_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        """From when it was due to its end."""
        return self.end_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """(end-to-end − TTFT) / (n − 1); None with fewer than two tokens."""
        n = self.output_tokens
        return (self.e2e_s - self.ttft_s) / (n - 1) if n > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Gaps between chunks; a chunk may bring several tokens."""
        times = self.chunk_times_s
        return [after - before for before, after in itertools.pairwise(times)]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How requests are sent. `extra` goes into every body."""

    model: str
    chat: bool = False
    temperature: float = 0.0
    timeout_s: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)


async def run_load(
    endpoint: Endpoint,
    requests: Sequence[LoadRequest],
    options: LoadOptions,
    *,
    concurrency: int | None = None,
    on_end: Callable[[Served], None] | None = None,
) -> list[Served]:
    """Send all requests and give what became of each, in their order. None is lost.

    Args:
        endpoint: the server.
        requests: in order of arrival.
        options: how they are sent.
        concurrency: closed loop with so many at a time, arrivals ignored; None: open loop.
        on_end: told of each as it ends.
    """
    started = time.perf_counter()
    turns = None if concurrency is None else asyncio.Semaphore(concurrency)

    async def one(request: LoadRequest) -> Served:
        if turns is None:
            await asyncio.sleep(started + request.arrival_s - time.perf_counter())
            served = Served(request.arrival_s)
            await _send(endpoint, request, options, served, started)
        else:
            async with turns:
                served = Served(time.perf_counter() - started)
                await _send(endpoint, request, options, served, started)
        if on_end is not None:
            on_end(served)
        return served

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def _send(
    endpoint: Endpoint,
    request: LoadRequest,
    options: LoadOptions,
    served: Served,
    started: float,
) -> None:
    served.sent_s = time.perf_counter() - started
    body: dict[str, Any] = {
        "model": options.model,
        "max_tokens": request.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options.extra,
    }
    if options.chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        path = "/v1/completions"
        body["prompt"] = request.prompt
    try:
        async with asyncio.timeout(options.timeout_s):
            async for arrived, chunk in stream_events(endpoint, path, body):
                _note(served, chunk, arrived - started)
    except HttpError as error:
        served.error = str(error)
    except TimeoutError:
        served.error = f"no end within {options.timeout_s:g} s"
    except (ValueError, KeyError, TypeError) as error:
        served.error = f"an event that cannot be read: {error}"
    served.end_s = time.perf_counter() - started
    if served.error is None and not served.chunk_times_s:
        served.error = "an answer without text"
    if not served.has_usage:
        served.output_tokens = len(served.chunk_times_s)


def _note(served: Served, chunk: dict[str, Any], time_s: float) -> None:
    usage = chunk.get("usage")
    if usage:
        served.has_usage = True
        served.prompt_tokens = usage["prompt_tokens"]
        served.output_tokens = usage["completion_tokens"]
    for choice in chunk.get("choices") or ():
        if choice.get("text") or (choice.get("delta") or {}).get("content"):
            served.chunk_times_s.append(time_s)
