"""`pagelab bench serve`: load on any OpenAI-compatible server, and what it made of it."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagelab.bench.serve_client import Endpoint, HttpError, get_json
from pagelab.bench.serve_figures import PERCENTILES, figures
from pagelab.bench.serve_load import LoadOptions, LoadRequest, Served, run_load
from pagelab.errors import ConfigError, PageLabError, ReportError
from pagelab.results import Objectives
from pagelab.telemetry import describe_environment
from pagelab.workloads import ShapeOptions, Workload, load_workload, tokenize

SCHEMA = "pagelab.bench.serve"
VERSION = 1

Record = dict[str, Any]


class ServerUnreachableError(PageLabError):
    """The server to be measured does not answer as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """What is measured, and how.

    Attributes:
        url: of the server.
        api_key: for it.
        model: asked for; None: the first that `/v1/models` lists.
        tokenizer: whose tokens prompts of a given length are counted in: a folder, a `.gguf` file
            or a hub id; None: the default model's.
        send_ids: prompts as token ids, exact in length, where the server takes them; else texts.
        chat: `/v1/chat/completions` instead of `/v1/completions`.
        workload: a workload's name, a generator or a trace file.
        rate: when requests arrive; None: the workload's own times.
        concurrency: closed loop with so many at a time; not beside `rate`.
        num_requests: how many of the workload.
        warmup: requests beforehand, not counted.
        ignore_eos: ask the server to generate every token (vLLM's and our own field).
        objectives: what a good request meets.
        offline: a record of `pagelab bench throughput --json`, to compare with.
    """

    url: str
    api_key: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    send_ids: bool = False
    chat: bool = False
    workload: str = "uniform:in=16..256,out=16..128,n=64"
    rate: str | None = None
    concurrency: int | None = None
    num_requests: int | None = None
    warmup: int = 2
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0
    objectives: Objectives
    offline: Path | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError("--rate is an open loop and --concurrency a closed one: give one")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"--concurrency must be at least 1, not {self.concurrency}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup must be at least 0, not {self.warmup}")
        if self.chat and self.send_ids:
            raise ConfigError("--chat sends texts: leave --send-ids out")


def bench_serve(
    settings: ServeBench, command: str, on_end: Callable[[int, int, Served], None] | None = None
) -> Record:
    """Run it and give the record. `on_end` is told (ended, in all, the request).

    Raises:
        ConfigError: settings or a workload that cannot be used.
        ServerUnreachableError: the server does not answer.
    """
    offline = None if settings.offline is None else _offline_rate(settings.offline)
    workload = _workload(settings)
    requests = [
        LoadRequest(
            r.token_ids if settings.send_ids else (r.prompt_text or ""), r.max_tokens, r.arrival_s
        )
        for r in workload.requests
    ]
    return asyncio.run(_bench(settings, workload, requests, offline, command, on_end))


async def _bench(
    settings: ServeBench,
    workload: Workload,
    requests: list[LoadRequest],
    offline: float | None,
    command: str,
    on_end: Callable[[int, int, Served], None] | None,
) -> Record:
    endpoint = Endpoint.parse(settings.url, settings.api_key)
    model = settings.model or await _first_model(endpoint)
    extra = {"ignore_eos": True} if settings.ignore_eos else {}
    options = LoadOptions(model, settings.chat, settings.temperature, settings.timeout_s, extra)
    warm = [dataclasses.replace(r, arrival_s=0.0) for r in requests[: settings.warmup]]
    for served in await run_load(endpoint, warm, options):
        if served.error is not None:
            raise ServerUnreachableError(f"a request to warm up failed: {served.error}")
    ended = 0

    def note(served: Served) -> None:
        nonlocal ended
        ended += 1
        if on_end is not None:
            on_end(ended, len(requests), served)

    started = time.perf_counter()
    all_served = await run_load(
        endpoint, requests, options, concurrency=settings.concurrency, on_end=note
    )
    duration = time.perf_counter() - started
    found = figures(all_served, duration, settings.objectives, settings.seed)
    failures = [one.error for one in all_served if one.error is not None]
    record = {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "environment": describe_environment(),
        "server": {"url": settings.url, "model": model},
        "settings": {
            "workload": workload.name,
            "title": workload.title,
            "rate": settings.rate,
            "concurrency": settings.concurrency,
            "warmup": settings.warmup,
            "seed": settings.seed,
            "chat": settings.chat,
            "send_ids": settings.send_ids,
            "ignore_eos": settings.ignore_eos,
            "temperature": settings.temperature,
            "objectives": settings.objectives,
        },
        "duration_s": duration,
        "num_requests": len(requests),
        "num_failed": len(failures),
        "errors": sorted(set(failures))[:20],
        "num_without_usage": sum(o.error is None and not o.has_usage for o in all_served),
        "prompt_tokens": sum(one.prompt_tokens for one in all_served),
        "output_tokens": sum(one.output_tokens for one in all_served),
        "most_late_s": max((one.sent_s - one.due_s for one in all_served), default=0.0),
        "figures": found,
        "requests": [dataclasses.asdict(one) for one in all_served],
    }
    if offline is not None:
        rate = found["output_tokens_per_s"]["value"]
        record["offline"] = {"output_tokens_per_s": offline, "ratio": rate / offline}
    return record


def save(record: Record, path: Path) -> None:
    """Write a record as JSON.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}") from error


def table(record: Record) -> str:
    """The record for a terminal."""
    found = record["figures"]
    lines = [
        f"{record['server']['model']} at {record['server']['url']}: {record['settings']['title']}",
        f"{record['num_requests']} requests in {record['duration_s']:.2f} s, "
        f"{record['num_failed']} failed; {record['prompt_tokens']:,} tokens in, "
        f"{record['output_tokens']:,} out",
        "",
        "              mean  " + "".join(f"{f'p{q}':>12}" for q in PERCENTILES),
    ]
    for name in ("ttft", "itl", "tpot", "e2e"):
        names = [f"{name}_mean_s", *(f"{name}_p{q}_s" for q in PERCENTILES)]
        cells = "".join(f"{found[key]['value'] * 1000:>9.1f} ms" for key in names)
        lines.append(f"{name.upper():<7}{cells}")
    lines.append("")
    for name, words in (
        ("output_tokens_per_s", "output tokens/s"),
        ("total_tokens_per_s", "all tokens/s"),
        ("requests_per_s", "requests/s"),
        ("goodput_per_s", "goodput, requests/s"),
    ):
        if record["num_without_usage"] and name == "total_tokens_per_s":
            continue  # nobody said how long the prompts were
        if name in found:
            one = found[name]
            lines.append(
                f"{words:<22}{one['value']:>10.2f}   "
                f"({one['low']:.2f} to {one['high']:.2f} at 95 %)"
            )
    if "offline" in record:
        lines.append(
            f"offline engine        {record['offline']['output_tokens_per_s']:>10.2f}   "
            f"the server reaches {100 * record['offline']['ratio']:.1f} % of it"
        )
    if record["num_without_usage"]:
        lines.append(
            f"{record['num_without_usage']} answers came without usage: their prompts count as 0 "
            "tokens, and their chunks with text as the tokens out"
        )
    if record["settings"]["concurrency"] is None:
        lines.append(f"requests were sent {record['most_late_s'] * 1000:.1f} ms late at most")
    lines += [f"failed: {error}" for error in record["errors"][:5]]
    return "\n".join(lines)


async def _first_model(endpoint: Endpoint) -> str:
    try:
        listed = await get_json(endpoint, "/v1/models")
        return str(listed["data"][0]["id"])
    except (HttpError, LookupError, TypeError) as error:
        raise ServerUnreachableError(
            f"no model at {endpoint.host}:{endpoint.port} ({error}): is --url right, and --api-key?"
        ) from error


def _workload(settings: ServeBench) -> Workload:
    from pagelab.models.fetch import resolve
    from pagelab.models.registry import load_tokenizer

    tokenizer = load_tokenizer(resolve(settings.tokenizer))
    options = ShapeOptions(num_requests=settings.num_requests, rate=settings.rate)
    workload = load_workload(settings.workload, settings.seed, options, tokenizer.encode)
    return tokenize(
        workload, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode
    )


def _offline_rate(path: Path) -> float:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rate = float(record["summary"]["output_tokens_per_s"]["median"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--offline {path} is no record of 'pagelab bench throughput --json': {error}"
        ) from error
    if rate <= 0:
        raise ConfigError(f"--offline {path} has a rate of {rate}")
    return rate
