"""The live page map's news: a mirror of the pool, kept while somebody looks at it.

::

    engine ── BlockNews, 5 a second ──▶ mirror ──▶ everything, to who comes
                                          └──────▶ changes, to those who are there

Nobody looks: the engine is told to send nothing. A client that does not keep up gets everything
again instead of what it missed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from pagelab.engine.async_llm import AsyncLLM
from pagelab.engine.messages import BlockNews, EngineInfo, RequestRow, StepStats
from pagelab.engine.request_stream import RequestStream
from pagelab.metrics import percentile
from pagelab.server.metrics import ServerMetrics
from pagelab.server.recording import Recording
from pagelab.server.sse import event

EVERY_S = 0.2
MOST_CLIENTS = 32

_BEHIND = 4  # undelivered events at which a client gets everything anew
_STATUS_EVERY_S = 1.0  # news without blocks, so that an idle page knows that it is connected
_LATENCIES_OF_S = 60.0

_FREE = (-1, 0, 0)


class PageMap:
    """Observer of the engine, source of events for pages."""

    def __init__(self, llm: AsyncLLM, metrics: ServerMetrics) -> None:
        self._llm = llm
        self._metrics = metrics
        self._blocks: dict[int, tuple[int, int, int]] = {}
        self._tables: dict[tuple[str, int], tuple[int, ...]] = {}
        self._last: BlockNews | None = None
        self._clients: set[asyncio.Queue[bytes]] = set()
        self._closed = asyncio.Event()
        self.recording = Recording()

    @property
    def num_clients(self) -> int:
        """Pages that look."""
        return len(self._clients)

    def close(self) -> None:
        """End all streams."""
        self._closed.set()
        for client in self._clients:
            client.put_nowait(b"")

    def stepped(self, stats: StepStats) -> None:
        """`Observer`."""

    def ended(self, stream: RequestStream) -> None:
        """For the recording."""
        self.recording.ended(stream)

    def started(self, info: EngineInfo) -> None:
        """A new engine has an empty pool."""
        self.recording.clear()
        self._blocks.clear()
        self._tables.clear()
        self._last = None
        self._tell(self._everything())

    def blocks_changed(self, news: BlockNews) -> None:
        """Take news in and pass them on."""
        if news.everything:
            self._blocks.clear()
        for block, *now in news.blocks:
            state = (now[0], now[1], now[2])
            if state == _FREE:
                self._blocks.pop(block, None)
            else:
                self._blocks[block] = state
        before, self._tables = self._tables, {}
        for row in news.rows:
            key = (row.request_id, row.sample)
            kept = before.get(key, ())[: row.kept]
            self._tables[key] = kept + row.block_ids if row.block_ids else kept
        self._last = news
        self.recording.add(news)
        if news.everything:
            self._tell(self._everything())
        else:
            self._tell(self._event("change", news.blocks))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Everything, then changes, until the client goes."""
        client: asyncio.Queue[bytes] = asyncio.Queue()
        if not self._clients:
            self._llm.watch_blocks(EVERY_S)
        self._clients.add(client)
        try:
            yield self._everything()
            while not self._closed.is_set():
                try:
                    async with asyncio.timeout(_STATUS_EVERY_S):
                        data = await client.get()
                except TimeoutError:
                    data = self._event("idle", ())
                if client.qsize() > _BEHIND:
                    while not client.empty():
                        client.get_nowait()
                    data = self._everything()
                yield data
        finally:
            self._clients.discard(client)
            if not self._clients:
                self._llm.watch_blocks(None)

    def _tell(self, data: bytes) -> None:
        for client in self._clients:
            if client.qsize() <= _BEHIND + 1:
                client.put_nowait(data)

    def _everything(self) -> bytes:
        return self._event("all", tuple((block, *now) for block, now in self._blocks.items()))

    def _event(self, kind: str, blocks: tuple[tuple[int, int, int, int], ...]) -> bytes:
        llm, last = self._llm, self._last
        stats = llm.stats
        data: dict[str, Any] = {
            "kind": kind,
            "state": str(llm.state),
            "time": time.time(),
            "restarts": llm.num_restarts,
            "blocks": [number for block in blocks for number in block],
        }
        if kind == "all" and llm.state == "ready":
            data["info"] = llm.info._asdict()
        if stats is not None:
            data["stats"] = stats._asdict() | {"ledger": stats.ledger._asdict()}
            ttfts, gaps = self._metrics.recent(_LATENCIES_OF_S)
            data["latency"] = {
                "ttft": [percentile(ttfts, q) for q in (50, 95)] if ttfts else None,
                "itl": [percentile(gaps, q) for q in (50, 95)] if gaps else None,
            }
        if last is not None and kind != "idle":
            now = time.perf_counter()
            data["unlisted"] = last.num_unlisted
            data["requests"] = [
                [*row[:10], round(now - row.arrival_time, 2), *self._table(row, kind == "all")]
                for row in last.rows
            ]
        return event(data)

    def _table(self, row: RequestRow, everything: bool) -> tuple[int, tuple[int, ...]]:
        """How much of its table a page knows, and the rest."""
        if everything:
            return 0, self._tables[row.request_id, row.sample]
        return row.kept, row.block_ids
