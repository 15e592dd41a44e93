"""A thousand clients stream at once: none lost, none mixed up, and what the server costs.

    python benchmarks/serve_clients.py [--clients 1000] [--tokens 16] [--rounds 3]
    python benchmarks/serve_clients.py --alone all --texts alone.json --dtype bfloat16

The same prompts run offline (`LLM.generate`, all at once, a process of its own) and, from so many
clients at the same time, through `pagelab serve`: in turn, `--rounds` times. Each stream's text
must be that of its request offline, and of its request alone where that was run, too (`--alone`).
`--texts` keeps the texts of requests alone in a file, or takes them from there: a thousand of them
take minutes. Printed: tokens a second of both, memory of the server's processes, how late its event
loop was, latencies, and seconds of CPU: on a machine that others use, too, only these say what the
server costs. Exit code 1 if a stream was lost or mixed up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from pagelab.bench.serve_client import Endpoint, HttpError, get_json, stream_events
from pagelab.metrics import percentile

TOPICS = ("tea", "rain", "a clock", "the sea", "bread", "a fox", "snow", "a bridge", "salt", "ink")


def prompts(count: int) -> list[str]:
    """All different."""
    return [f"Story number {i}, about {TOPICS[i % len(TOPICS)]}: it" for i in range(count)]


def offline(options: argparse.Namespace) -> None:
    """The offline engine, in a process of its own.

    For each line "alone N" or "batch" on stdin: the texts and the seconds that they took.
    """
    from pagelab import LLM, SamplingParams

    llm = LLM(
        options.model,
        kv_memory=options.kv_memory,
        dtype=options.dtype,
        threads=options.threads,
        progress=False,
    )
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    asked = prompts(options.clients)
    llm.generate(asked[:2], params, progress=False)
    for line in sys.stdin:
        how, _, count = line.partition(" ")
        groups = [[prompt] for prompt in asked[: int(count)]] if how == "alone" else [asked]
        started = time.perf_counter()
        outputs = [o for group in groups for o in llm.generate(group, params, progress=False)]
        duration = time.perf_counter() - started
        print(json.dumps([[output.text for output in outputs], duration]), flush=True)


class Offline:
    """The offline engine's process."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, *sys.argv, "--offline-only"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> tuple[list[str], float]:
        """Texts, and the seconds that they took."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(what + "\n")
        self._child.stdin.flush()
        texts, duration = json.loads(self._child.stdout.readline())
        return texts, duration

    def close(self) -> None:
        """End it."""
        self._child.communicate(timeout=60)


def alone_texts(options: argparse.Namespace, engine: Offline) -> list[str]:
    """Of requests alone, from the file or from the engine."""
    if options.texts is not None and options.texts.exists():
        found = json.loads(options.texts.read_text())
        assert found["tokens"] == options.tokens, f"{options.texts} is of other requests"
        return list(found["texts"])
    texts, _ = engine.ask(f"alone {options.alone}")
    if options.texts is not None:
        options.texts.write_text(json.dumps({"tokens": options.tokens, "texts": texts}))
    return texts


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
    lag = loop_lag(await metrics(endpoint))
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
    processes = (server, engine, psutil.Process())
    cpu = [cpu_s(process) for process in processes]
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
        "after": [p.memory_info().rss for p in (server, engine)],
        "cpu": [cpu_s(process) - before for process, before in zip(processes, cpu, strict=True)],
        "lag": {le: n - lag[le] for le, n in loop_lag(await metrics(endpoint)).items()},
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


class Others:
    """What other programs used of the processors since this was made."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Of all the time that there was, by our processes' own account."""
        busy, ours, wall = (now - b for now, b in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - ours) / (wall * (psutil.cpu_count() or 1))

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        here = psutil.Process()
        ours = sum(cpu_s(p) for p in (here, *here.children(recursive=True)))
        busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        return busy, ours, time.perf_counter()


def rss(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="offline and served, in turn")
    parser.add_argument("--alone", default="10", help="requests also run alone, or `all`")
    parser.add_argument("--texts", type=Path, help="keep the texts of requests alone here")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--offline-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.alone = options.clients if options.alone == "all" else int(options.alone)
    return options


def serve(options: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """A server's process and its port."""
    command = [sys.executable, "-m", "pagelab", "serve", "--port", "0", "--no-page-map"]
    for name in ("kv_memory", "dtype", "model", "threads"):
        if getattr(options, name) is not None:
            command += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert child.stderr is not None
    found = re.search(r":(\d+),", line := child.stderr.readline())
    assert found is not None, line
    return child, int(found[1])


def main() -> int:
    """Run both and print what came of it."""
    options = parse()
    if options.offline_only:
        offline(options)
        return 0
    wrong = 0
    behind = []
    engine = Offline()
    child, port = serve(options)
    try:
        alone = alone_texts(options, engine)
        print(f"{options.clients} clients at once, {options.tokens} tokens each")
        for _ in range(options.rounds):
            others = Others()
            texts, duration = engine.ask("batch")
            shares = [others.share()]
            changed = sum(a != b for a, b in zip(texts, alone, strict=False))
            if changed:
                print(
                    f"offline, {changed} of {len(alone)} texts are others alone: a batch did that"
                )
            others = Others()
            result = asyncio.run(served(options, port, child.pid))
            shares.append(others.share())
            print(f"other programs: {shares[0]:.1%} of the machine offline, {shares[1]:.1%} served")
            wrong += tell(options, result, texts, alone, duration)
            behind.append(100 * (1 - result["rate"] * duration / options.clients / options.tokens))
    finally:
        engine.close()
        child.terminate()
        child.communicate(timeout=60)
    if not behind:
        return 0  # only the texts of requests alone were wanted
    print(
        f"behind the offline engine: median {statistics.median(behind):.1f} % of "
        + ", ".join(f"{share:.1f}" for share in behind)
        + f"; exit code {child.returncode}"
    )
    return 1 if wrong else 0


def tell(
    options: argparse.Namespace,
    result: dict[str, Any],
    texts: list[str],
    alone: list[str],
    offline_s: float,
) -> int:
    """Print what a round was; how many streams were lost or mixed up."""
    lost: list[str] = result["lost"]
    served_texts: list[str] = result["texts"]
    mixed = sum(a != b for a, b in zip(served_texts, texts, strict=True))
    others = sum(a != b for a, b in zip(served_texts, alone, strict=False))
    print(
        f"lost {len(lost)}, mixed up {mixed}; {others} of {len(alone)} texts are not "
        "those of their request alone"
    )
    expected = options.clients * options.tokens / offline_s
    print(f"offline {expected:.1f} tok/s, served {result['rate']:.1f} tok/s")
    for name in ("ttft", "itl"):
        if result[name]:
            at = ", ".join(f"p{q} {percentile(result[name], q):.3f}" for q in (50, 95, 99, 100))
            print(f"{name.upper()} (s): {at}")
    front, engine, clients = result["cpu"]
    each = front / (options.clients * options.tokens) * 1e6
    print(
        f"CPU: the server {front:.2f} s ({each:.0f} µs a token), the engine {engine:.2f} s: "
        f"{100 * front / (front + engine):.1f} % is the server's; "
        f"the clients {clients:.2f} s"
    )
    mib = [size >> 20 for size in result["memory"]]
    print(
        f"memory of its processes: {mib[0]} MiB before, {max(mib)} MiB at most, afterwards "
        "{} MiB of the server and {} of the engine".format(*(b >> 20 for b in result["after"]))
    )
    lag = result["lag"]
    late = next(bound for bound, count in lag.items() if count == lag["+Inf"])
    over = lag["+Inf"] - lag["0.05"]
    looks = f"{lag['+Inf']:.0f} looks, {over:.0f} times more than 0.05"
    print(f"event loop: never more than {late} s late in {looks}", flush=True)
    for error in lost[:3]:
        print("lost:", error)
    wrong = [i for i, text in enumerate(served_texts) if text != texts[i]]
    for i in wrong[:3]:
        one = alone[i] if i < len(alone) else "(not run)"
        print(f"mixed up: request {i}: {served_texts[i]!r}, offline {texts[i]!r}, alone {one!r}")
    return mixed + others + len(lost)


if __name__ == "__main__":
    sys.exit(main())
