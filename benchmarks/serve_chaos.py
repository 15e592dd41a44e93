"""The chaos run: clients that vanish, slow readers, half-open sockets, garbage, and kill -9.

    python benchmarks/serve_chaos.py [--seconds 60] [--clients 4] [--model NAME] [--seed 0]

Starts `pagelab serve`, does all of that at once, kills the engine's process in the middle, and then
looks: no slot of the KV pool may be held, and the next request must be answered. Exit code 1 if
anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys

import psutil
from tests.support.chaos import Outcome, chaos, settle

from pagelab.bench.serve_client import Endpoint, HttpError, get_json


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def kill_children(server: psutil.Process) -> None:
    """SIGKILL to the engine."""
    for child in server.children():
        child.kill()


async def run(options: argparse.Namespace, port: int, server: psutil.Process) -> Outcome:
    """Wait for the model, then chaos, then peace."""
    endpoint = Endpoint.parse(f"127.0.0.1:{port}")
    while True:
        try:
            await get_json(endpoint, "/ready")
            break
        except HttpError:
            await asyncio.sleep(0.1)
    outcome = await chaos(
        port,
        None,
        lambda: kill_children(server),
        seconds=options.seconds,
        clients=options.clients,
        seed=options.seed,
        tokens=options.tokens,
    )
    await settle(port, None, outcome, limit_s=120)
    return outcome


def main() -> int:
    """Run it and print what came of it."""
    options = parse()
    command = [sys.executable, "-m", "pagelab", "serve", "--port", "0", "--kv-memory", "256MiB"]
    command += ["--model", options.model] if options.model else []
    command += ["--threads", str(options.threads)] if options.threads else []
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        found = re.search(r":(\d+),", child.stderr.readline())
        assert found is not None
        server = psutil.Process(child.pid)
        outcome = asyncio.run(run(options, int(found[1]), server))
        memory = sum(p.memory_info().rss for p in (server, *server.children())) >> 20
    finally:
        child.terminate()
        child.communicate(timeout=60)
    for kind, count in sorted(outcome.counts.items()):
        print(f"{count:>7,} {kind}")
    print(f"memory afterwards: {memory} MiB; exit code {child.returncode}")
    for problem in outcome.wrong[:20]:
        print("WRONG:", problem)
    return 1 if outcome.wrong or child.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
