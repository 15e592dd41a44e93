"""A thousand clients stream at once: none lost, none mixed up, and what the server costs.

    python benchmarks/serve_clients.py [--clients 1000] [--tokens 16] [--model NAME] [--threads 2]

The same prompts first run offline (`LLM.generate`, all at once, a process of its own), some of them
alone; then `pagelab serve` gets them from so many clients at the same time. Each stream's text must
be that of its request offline. Printed: tokens a second of both, memory of the server's processes,
how late its event loop was, latencies, and seconds of CPU: on a machine that others use, too, only
these say what the server costs. Exit code 1 if a stream was lost or mixed up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import psutil

from pagelab.bench.serve_client import Endpoint, HttpError, get_json, stream_events
from pagelab.metrics import percentile

TOPICS = ("tea", "rain", "a clock", "the sea", "bread", "a fox", "snow", "a bridge", "salt", "ink")


def prompts(count: int) -> list[str]:
    """All different."""
    return [f"Story number {i}, about {TOPICS[i % len(TOPICS)]}: it" for i in range(count)]


def offline(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: all at once, and a few alone."""
    from pagelab import LLM, SamplingParams

    llm = LLM(options.model, kv_memory=options.kv_memory, threads=options.threads, progress=False)
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    asked = prompts(options.clients)
    llm.generate(asked[:2], params, progress=False)
    alone = [llm.generate(p, params, progress=False)[0].text for p in asked[: options.alone]]
    started = time.perf_counter()
    outputs = llm.generate(asked, params, progress=False)
    duration = time.perf_counter() - started
    texts = [output.text for output in outputs]
    assert texts[: options.alone] == alone, "a batch changes tokens: not the server's doing"
    return {"texts": texts, "rate": len(texts) * options.tokens / duration}


async def served(options: argparse.Namespace, port: int, pid: int) -> dict[str, Any]:
    """All clients at once."""
    endpoint = Endpoint.parse(f"127.0.0.1:{port}")
    while True:
        try:
            if (await get_json(endpoint, "/ready"))["status"] == "ready":
                break
        except HttpError:
            await asyncio.sleep(0.1)
    texts = [""] * options.clients
    firsts: list[float] = []
    gaps: list[float] = []
    lost: list[str] = []
    body = {"temperature": 0, "max_tokens": options.tokens, "ignore_eos": True, "stream": True}
    for warm in prompts(2):
        async for _ in stream_events(endpoint, "/v1/completions", body | {"prompt": warm}):
            pass
    before = loop_lag(await metrics(endpoint))
    server = psutil.Process(pid)
    memory = [rss(server)]

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.5)
            memory.append(rss(server))

    async def one(i: int, prompt: str, started: float) -> None:
        last = None
        try:
            async for arrived, chunk in stream_events(
                endpoint, "/v1/completions", body | {"prompt": prompt}
            ):
                texts[i] += chunk["choices"][0]["text"]
                (firsts if last is None else gaps).append(arrived - (last or started))
                last = arrived
        except HttpError as error:
            lost.append(str(error))

    (engine,) = server.children()
    cpu = [cpu_s(server), cpu_s(engine)]
    watching = asyncio.create_task(watch())
    started = time.perf_counter()
    await asyncio.gather(*(one(i, p, started) for i, p in enumerate(prompts(options.clients))))
    duration = time.perf_counter() - started
    watching.cancel()
    return {
        "texts": texts,
        "rate": options.clients * options.tokens / duration,
        "lost": lost,
        "ttft": firsts,
        "itl": gaps,
        "memory": memory,
        "cpu": [cpu_s(server) - cpu[0], cpu_s(engine) - cpu[1]],
        "lag": {le: n - before[le] for le, n in loop_lag(await metrics(endpoint)).items()},
    }


async def metrics(endpoint: Endpoint) -> str:
    """The text of `/metrics`."""
    reader, writer = await endpoint.open()
    writer.write(endpoint.head("GET", "/metrics", 0))
    data = (await reader.read()).decode()
    writer.close()
    return data


def loop_lag(text: str) -> dict[str, float]:
    """Observations of the event loop's lag, by the bucket's bound."""
    found = re.findall(r'pagelab_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', text)
    return {bound: float(count) for bound, count in found}


def cpu_s(process: psutil.Process) -> float:
    """Seconds of CPU that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def rss(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--alone", type=int, default=10, help="requests also run alone")
    parser.add_argument("--model")
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--offline-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run both and print what came of it."""
    options = parse()
    if options.offline_only:
        print(json.dumps(offline(options)))
        return 0
    done = subprocess.run(
        [sys.executable, *sys.argv, "--offline-only"], stdout=subprocess.PIPE, check=True
    )
    expected = json.loads(done.stdout)
    command = [sys.executable, "-m", "pagelab", "serve", "--port", "0", "--no-page-map"]
    command += ["--kv-memory", options.kv_memory]
    if options.model:
        command += ["--model", options.model]
    if options.threads:
        command += ["--threads", str(options.threads)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert child.stderr is not None
    try:
        line = child.stderr.readline()
        found = re.search(r":(\d+),", line)
        assert found is not None, line
        result = asyncio.run(served(options, int(found[1]), child.pid))
    finally:
        child.terminate()
        child.communicate(timeout=60)
    mixed = sum(a != b for a, b in zip(result["texts"], expected["texts"], strict=True))
    lag = result["lag"]
    late = [bound for bound, count in lag.items() if count == lag["+Inf"]]
    mib = [size >> 20 for size in result["memory"]]
    print(f"{options.clients} clients at once, {options.tokens} tokens each")
    print(f"lost {len(result['lost'])}, mixed up {mixed}; exit code {child.returncode}")
    print(
        f"offline {expected['rate']:.1f} tok/s, served {result['rate']:.1f} tok/s: "
        f"{100 * (1 - result['rate'] / expected['rate']):.1f} % behind"
    )
    for name in ("ttft", "itl"):
        figures = ", ".join(f"p{q} {percentile(result[name], q):.3f}" for q in (50, 95, 99, 100))
        print(f"{name.upper()} (s): {figures}")
    front, engine = result["cpu"]
    each = front / (options.clients * options.tokens) * 1e6
    print(
        f"CPU: the server {front:.2f} s ({each:.0f} µs a token), the engine {engine:.2f} s: "
        f"{100 * front / (front + engine):.1f} % is the server's"
    )
    print(f"memory of its processes: {mib[0]} MiB before, {max(mib)} MiB at most")
    over = lag["+Inf"] - lag["0.05"]
    looks = f"{lag['+Inf']:.0f} looks, {over:.0f} times more than 0.05"
    print(f"event loop: never more than {late[0]} s late in {looks}")
    for error in result["lost"][:3]:
        print("lost:", error)
    return 1 if result["lost"] or mixed else 0


if __name__ == "__main__":
    sys.exit(main())
