"""Everything that goes wrong around a server, at once, for some seconds; then it must be as new."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pagelab.bench.serve_client import Endpoint, HttpError, stream_events

Check = Callable[[str, int], str]
"""(prompt, tokens) → the text that must come."""


@dataclass(slots=True)
class Outcome:
    """What came of it. `wrong` must be empty; clients may be refused while an engine starts."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def chaos(
    port: int,
    check: Check | None,
    kill_engine: Callable[[], None],
    *,
    seconds: float,
    clients: int = 3,
    seed: int = 0,
    tokens: int = 40,
) -> Outcome:
    """Bad and good clients for so many seconds, and the engine killed in the middle.

    Args:
        port: of the server, on loopback.
        check: says what good clients must get; None: anything that ends.
        kill_engine: ends the engine's process with SIGKILL.
        seconds: how long.
        clients: of each kind.
        seed: of everything random.
        tokens: that requests ask for at most.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    until = time.monotonic() + seconds
    endpoint = Endpoint.parse(f"127.0.0.1:{port}")
    kinds: list[Callable[[random.Random], Awaitable[None]]] = [
        lambda r: _good(endpoint, check, r, outcome, tokens),
        lambda r: _vanishing(port, r, outcome, tokens),
        lambda r: _slow(port, r, outcome, tokens),
        lambda r: _half_open(port, r, outcome),
        lambda r: _garbage(port, r, outcome),
        lambda r: _oversize(port, r, outcome),
    ]

    async def again(kind: Callable[[random.Random], Awaitable[None]], own: random.Random) -> None:
        while time.monotonic() < until:
            try:
                await asyncio.wait_for(kind(own), seconds + 20)
            except OSError:
                outcome.counts["connections that broke"] += 1
            await asyncio.sleep(own.random() * 0.05)

    async def killer() -> None:
        await asyncio.sleep(seconds / 2)
        kill_engine()
        outcome.counts["engines killed"] += 1

    await asyncio.gather(
        killer(),
        *(again(kind, random.Random(rng.random())) for kind in kinds for _ in range(clients)),
    )
    return outcome


async def settle(port: int, check: Check | None, outcome: Outcome, limit_s: float = 30.0) -> None:
    """Wait until no slot is held, and ask once more; what is wrong goes into the outcome."""
    endpoint = Endpoint.parse(f"127.0.0.1:{port}")
    deadline = time.monotonic() + limit_s
    while True:
        status, text = await _fetch(port, "/metrics")
        held = {
            state: float(value)
            for state, value in re.findall(r'pagelab_kv_slots\{state="(\w+)"\} (\S+)', text)
        }
        up = "pagelab_engine_up 1.0" in text
        if status == 200 and up and held and held["live"] == held["unwritten"] == 0:
            break
        if time.monotonic() > deadline:
            outcome.wrong.append(f"slots are still held: {held}, up: {up}")
            return
        await asyncio.sleep(0.1)
    before = outcome.counts["right answers"]
    await _good(endpoint, check, random.Random(1), outcome, 10)
    if outcome.counts["right answers"] == before:
        outcome.wrong.append("the next request was not answered")


async def _good(
    endpoint: Endpoint, check: Check | None, rng: random.Random, outcome: Outcome, tokens: int
) -> None:
    prompt = f"good client {rng.randrange(10**6)} äöü 你好 🙂"
    count = rng.randint(1, tokens)
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    text = ""
    try:
        async for _, chunk in stream_events(endpoint, "/v1/completions", body | {"stream": True}):
            text += chunk["choices"][0]["text"]
    except HttpError as error:
        outcome.counts["good clients with an error"] += 1
        allowed = ("status 503", "status 429", "status 500", "engine", "broke", "connect")
        if not any(word in str(error) for word in allowed):
            outcome.wrong.append(f"a good client got {error}")
        return
    if check is not None and text != check(prompt, count):
        outcome.wrong.append(f"a wrong text for {prompt!r}")
    outcome.counts["right answers"] += 1


async def _vanishing(port: int, rng: random.Random, outcome: Outcome, tokens: int) -> None:
    _reader, writer = await _send(port, rng, tokens, stream=rng.random() < 0.7)
    await asyncio.sleep(rng.random() * 0.2)
    if rng.random() < 0.5:  # a reset instead of a farewell
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    outcome.counts["clients that vanished"] += 1


async def _slow(port: int, rng: random.Random, outcome: Outcome, tokens: int) -> None:
    reader, writer = await _send(port, rng, tokens, stream=True)
    for _ in range(rng.randint(1, 20)):
        if not await reader.read(50):
            break
        await asyncio.sleep(0.05)
    writer.close()
    outcome.counts["slow readers"] += 1


async def _half_open(port: int, rng: random.Random, outcome: Outcome) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    writer.write(head[: rng.randrange(len(head) + 1)])
    await asyncio.sleep(rng.random())
    writer.close()
    outcome.counts["half-open sockets"] += 1


async def _garbage(port: int, rng: random.Random, outcome: Outcome) -> None:
    body = rng.randbytes(rng.randrange(2000))
    if rng.random() < 0.3:
        data = body  # not even HTTP
    else:
        path = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
        data = _head(path, len(body)) + body
    status = await _ask(port, data)
    outcome.counts["garbage"] += 1
    if status is not None and not 400 <= status < 500 and status != 503:
        outcome.wrong.append(f"garbage was answered with {status}")


async def _oversize(port: int, rng: random.Random, outcome: Outcome) -> None:
    body = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    status = await _ask(port, _head("/v1/completions", len(body)) + body)
    outcome.counts["oversize bodies"] += 1
    if status not in (413, None):  # None: the connection was closed while it was being sent
        outcome.wrong.append(f"an oversize body was answered with {status}")
    await asyncio.sleep(0.2 * rng.random())


async def _ask(port: int, data: bytes) -> int | None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(20), 20)
    except (OSError, TimeoutError):
        return None
    finally:
        writer.close()
    found = re.match(rb"HTTP/1.1 (\d+)", answer)
    return int(found[1]) if found else None


async def _fetch(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return int(text.split(" ", 2)[1]), text


async def _send(
    port: int, rng: random.Random, tokens: int, *, stream: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body: dict[str, Any] = {
        "prompt": f"a client that leaves {rng.randrange(1000)}",
        "max_tokens": tokens * 4,
        "ignore_eos": True,
        "stream": stream,
        "n": rng.randint(1, 3),
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_head("/v1/completions", len(data)) + data)
    return reader, writer


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()
