"""Nothing is left of requests that ended, and nobody waits for Python's collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from pagelab.engine.launch import EngineState
from pagelab.engine.messages import AddRequest, CancelRequest, Shutdown, StopSequence
from pagelab.engine.worker import EngineWorker
from pagelab.server import garbage
from pagelab.types import SamplingParams
from tests.support.toy_process import SlowToyRunner, make


def alive() -> Counter[str]:
    """Objects of our classes, by class."""
    gc.collect()
    kinds = (type(item) for item in gc.get_objects())
    return Counter(k.__qualname__ for k in kinds if str(k.__module__).startswith("pagelab."))


def test_an_engine_keeps_nothing_of_requests_that_ended() -> None:
    core, _, _ = make()
    runner = core.runner
    assert isinstance(runner, SlowToyRunner)
    ended = threading.Semaphore(0)

    def tell(news: Any) -> None:
        if news.ended:
            ended.release(len(news.ended))

    worker = EngineWorker(core, tell)
    thread = threading.Thread(target=worker.run)
    thread.start()

    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2)

    def burst(round_: int) -> None:
        for i in range(40):
            name = f"{round_}-{i}"
            prompt = (round_, *range(i))  # most have a prefix in common
            worker.inbox.put(AddRequest(name, prompt, params, 0, 0.0))
            if i % 4 == 1:
                worker.inbox.put(CancelRequest(name))
            if i % 4 == 2:
                worker.inbox.put(StopSequence(name, 0))
        for _ in range(40):
            assert ended.acquire(timeout=20)

    try:
        for round_ in range(3):
            burst(round_)
        before = alive()
        for round_ in range(3, 9):
            burst(round_)
        runner._last.clear()  # the toy's own notes
        after = alive()
    finally:
        worker.inbox.put(Shutdown())
        thread.join(timeout=20)
    assert not worker._requests
    assert not core.has_unfinished_requests
    assert after["Request"] == after["Sequence"] == 0
    grown = {kind: n - before[kind] for kind, n in after.items() if n > before[kind]}
    assert sum(grown.values()) < 40, grown  # 240 requests were served meanwhile


def test_full_collections_wait_until_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = gc.get_threshold()
    collected: list[int] = []
    llm: Any = SimpleNamespace(state=EngineState.LOADING, num_requests=0)
    monkeypatch.setattr(garbage, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on
    monkeypatch.setattr(gc, "collect", lambda: collected.append(llm.num_requests))

    async def main() -> None:
        task = asyncio.ensure_future(garbage.collect_when_idle(llm, idle_s=0.1, longest_s=1.0))
        await asyncio.sleep(0.01)
        assert not gc.isenabled()  # the model is being loaded
        llm.state = EngineState.READY
        await asyncio.sleep(0.02)
        assert gc.isenabled()
        assert gc.get_threshold()[2] > 10**6
        assert collected == []  # nothing has been done yet
        llm.num_requests = 5
        await asyncio.sleep(0.02)
        assert collected == []
        llm.num_requests = 0
        await asyncio.sleep(0.02)
        assert collected == []  # connections are being closed
        await asyncio.sleep(0.3)
        assert collected == [0]
        llm.num_requests = 5
        await asyncio.sleep(1.3)
        assert collected[:2] == [0, 5]  # it is never idle: once it must be
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert gc.get_threshold() == thresholds
    assert gc.isenabled()
