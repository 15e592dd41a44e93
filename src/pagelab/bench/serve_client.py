"""A small asynchronous HTTP client for streams: it adds little to what it measures.

One connection a request, HTTP/1.1, server-sent events, chunked or not. Written for the load tool:
an event is stamped when its bytes have come, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pagelab.errors import ConfigError

_HEAD_LIMIT = 1 << 20


class HttpError(Exception):
    """An answer that is no success, or none at all."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go: scheme, host and port, the path before `/v1`, and who asks."""

    host: str
    port: int
    secure: bool
    base: str
    api_key: str | None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """From `http://127.0.0.1:8000`, with or without `/v1` at its end.

        Raises:
            ConfigError: it is no such address.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"--url {url!r} is no address: {error}") from error
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"--url {url!r} is no http address, as http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if secure else 80), secure, base, api_key)

    def head(self, method: str, path: str, length: int) -> bytes:
        """A request's head."""
        lines = [
            f"{method} {self.base}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Accept: */*",
            "Connection: close",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection.

        Raises:
            HttpError: nobody listens.
        """
        context = ssl.create_default_context() if self.secure else None
        try:
            return await asyncio.open_connection(
                self.host, self.port, ssl=context, limit=_HEAD_LIMIT
            )
        except OSError as error:
            raise HttpError(f"cannot connect to {self.host}:{self.port}: {error}") from error


async def get_json(endpoint: Endpoint, path: str) -> Any:
    """An answer's JSON.

    Raises:
        HttpError: it is no success, or no JSON.
    """
    body = b"".join([data async for _, data in _exchange(endpoint, "GET", path, b"")])
    try:
        return json.loads(body)
    except ValueError as error:
        raise HttpError(f"{path} answered no JSON") from error


async def stream_events(
    endpoint: Endpoint, path: str, body: Mapping[str, Any]
) -> AsyncIterator[tuple[float, Any]]:
    """(time of arrival, JSON) of each event up to `[DONE]`.

    Raises:
        HttpError: the answer is no success, breaks off, or says that it failed.
    """
    rest = b""
    async for arrived, data in _exchange(endpoint, "POST", path, json.dumps(body).encode()):
        *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    return
                found = json.loads(text)
                if isinstance(found, dict) and found.get("error"):
                    raise HttpError(str(found["error"].get("message", found["error"])))
                yield arrived, found
    raise HttpError("the stream broke off before [DONE]")


async def _exchange(
    endpoint: Endpoint, method: str, path: str, body: bytes
) -> AsyncIterator[tuple[float, bytes]]:
    """The body's pieces as they come, each with its time."""
    reader, writer = await endpoint.open()
    try:
        writer.write(endpoint.head(method, path, len(body)) + body)
        status, headers = await _read_head(reader)
        pieces = _pieces(reader, headers)
        if status != 200:
            text = b"".join([data async for _, data in pieces])
            raise HttpError(f"status {status}: {text[:300].decode(errors='replace')}")
        async for piece in pieces:
            yield piece
    except (OSError, asyncio.IncompleteReadError) as error:
        raise HttpError(f"the connection broke: {error}") from error
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.LimitOverrunError as error:
        raise HttpError("the answer's head has no end") from error
    first, *lines = head.split("\r\n")
    fields = first.split(" ", 2)
    if len(fields) < 2 or not fields[1].isdigit():
        raise HttpError(f"no HTTP answer: {first[:80]!r}")
    pairs = (line.partition(":") for line in lines if line)
    return int(fields[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _pieces(
    reader: asyncio.StreamReader, headers: Mapping[str, str]
) -> AsyncIterator[tuple[float, bytes]]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            data = await reader.readexactly(size)
            yield time.perf_counter(), data
            await reader.readexactly(2)
    elif "content-length" in headers:
        data = await reader.readexactly(int(headers["content-length"]))
        yield time.perf_counter(), data
    else:
        while data := await reader.read(1 << 16):
            yield time.perf_counter(), data
