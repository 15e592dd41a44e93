"""`AsyncLLM` over a toy engine in a real process of its own: streams, failures, death."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pagelab.engine.async_llm import A_TURN, AsyncLLM
from pagelab.engine.launch import EngineState
from pagelab.engine.llm import LLM
from pagelab.engine.messages import BlockNews, EngineInfo, News, StepStats
from pagelab.engine.options import EngineOptions
from pagelab.engine.request_stream import RequestStream
from pagelab.errors import (
    ConfigError,
    EngineDeadError,
    EngineUnavailableError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    RequestTooLongError,
)
from pagelab.memory.ledger import LedgerEntry
from pagelab.types import FinishReason, RequestMetrics, SamplingParams
from tests.support.engines import greedy
from tests.support.toy_process import DEADLY, POISON, POISON_ALL, VOCAB, toy_llm, toy_tokenizer
from tests.support.toy_runner import generate

PROMPT = tuple(range(40))
EMPTY_NEWS = News(
    (), (), (), (), (),
    StepStats(0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, LedgerEntry(*[0] * 7), 0, 0, 0, 0),
)  # fmt: skip


def run(test: Callable[[AsyncLLM], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with toy_llm(**options) as llm:
            await asyncio.wait_for(test(llm), 30)

    asyncio.run(main())


async def settled(llm: AsyncLLM) -> StepStats:
    """The engine's figures once nothing runs."""
    await llm.generate(PROMPT[:2], greedy(1))
    assert llm.stats is not None
    return llm.stats


async def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.01)


def test_many_streams_at_once_get_each_the_tokens_of_its_own_prompt() -> None:
    async def test(llm: AsyncLLM) -> None:
        async def one(i: int) -> None:
            prompt = (i % 200, *PROMPT)
            ids: list[int] = []
            text = ""
            async for delta in llm.stream(prompt, greedy(30)):
                ids += delta.token_ids
                text += delta.text
            assert ids == generate(prompt, 30, 0, VOCAB)
            assert text == toy_tokenizer().decode(ids)

        await asyncio.gather(*(one(i) for i in range(150)))
        assert llm.num_requests == llm.num_waiting == 0
        ledger = (await settled(llm)).ledger
        assert ledger.live == ledger.unwritten == 0

    run(test)


def test_every_option_of_the_engine_can_be_passed() -> None:
    keywords = set(inspect.signature(LLM.__init__).parameters) - {"self", "model"}
    assert set(EngineOptions.__annotations__) == keywords
    with pytest.raises(ConfigError, match="kv_mem"):
        AsyncLLM(kv_mem=3)  # type: ignore[call-arg]


def test_parallel_samples_and_metrics() -> None:
    async def test(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=5, n=3, seed=7, ignore_eos=True)
        output = await llm.generate("hello", params)
        prompt = toy_tokenizer().encode("hello")
        expected = [generate(prompt, 5, 7 + i, VOCAB) for i in range(3)]
        assert [list(o.token_ids) for o in output.outputs] == expected
        assert output.metrics.finish_time is not None
        assert output.metrics.first_token_time is not None
        assert output.metrics.first_token_time > output.metrics.arrival_time

    run(test)


def test_a_stop_string_ends_the_sequence_in_the_engine_too() -> None:
    async def test(llm: AsyncLLM) -> None:
        ids = generate(PROMPT, 400, 0, VOCAB)
        letters = toy_tokenizer().decode(ids)
        stop = next(c for c in letters[10:] if c.isprintable() and c != "\ufffd")
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True, stop=[stop])
        output = await llm.generate(PROMPT, params)
        assert output.text == letters[: letters.index(stop)]
        assert output.finish_reason is FinishReason.STOP
        assert (await settled(llm)).total_tokens < 150  # not all 400

    run(test, step_s=0.002)


def test_a_request_that_cannot_be_served_is_refused_and_leaves_nothing() -> None:
    async def test(llm: AsyncLLM) -> None:
        with pytest.raises(RequestTooLongError, match="max_model_len"):
            await llm.generate(PROMPT, greedy(5000))
        with pytest.raises(RequestError, match="empty"):
            await llm.generate("", greedy(1))
        with pytest.raises(RequestError, match="no token id"):
            await llm.generate([VOCAB], greedy(1))
        assert llm.num_requests == llm.num_waiting == 0

    run(test)


def test_a_reader_that_leaves_frees_its_blocks_within_two_steps() -> None:
    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit(PROMPT, greedy(400))
        await anext(stream)
        assert llm.stats is not None
        step = llm.stats.step
        stream.cancel()
        other = await llm.submit(PROMPT[:3], greedy(400))
        await until(lambda: llm.stats is not None and llm.stats.num_running == 1)
        assert llm.stats.step <= step + 3  # the one in the works, and two more
        other.cancel()
        await until(lambda: llm.stats is not None and llm.stats.num_running == 0)
        assert llm.stats.ledger.live == 0

    run(test, step_s=0.02)


def test_a_cancelled_task_cancels_its_request() -> None:
    async def test(llm: AsyncLLM) -> None:
        task = asyncio.create_task(llm.generate(PROMPT, greedy(400)))
        await until(lambda: llm.stats is not None and llm.stats.num_running == 1)
        task.cancel()
        await until(lambda: llm.stats is not None and llm.stats.num_running == 0)
        assert llm.num_requests == 0

    run(test, step_s=0.01)


def test_a_failing_step_fails_only_its_requests() -> None:
    async def test(llm: AsyncLLM) -> None:
        poisoned = await llm.generate((POISON, *PROMPT), greedy(5))
        assert poisoned.outputs[0].error == "toy error"
        assert poisoned.finish_reason is FinishReason.ERROR
        good = asyncio.create_task(llm.generate(PROMPT, greedy(5)))
        assert (await good).finish_reason is FinishReason.LENGTH
        bad = await llm.generate((POISON_ALL, *PROMPT), greedy(5))
        assert "toy failure" in (bad.outputs[0].error or "")
        assert (await llm.generate(PROMPT, greedy(5))).finish_reason is FinishReason.LENGTH
        assert llm.num_restarts == 0

    run(test)


@pytest.mark.parametrize("how", ["kill -9", "abort"])
def test_a_dead_engine_fails_its_requests_and_is_started_again(how: str) -> None:
    async def test(llm: AsyncLLM) -> None:
        pid = llm.info.pid
        running = [asyncio.create_task(llm.generate((i, *PROMPT), greedy(400))) for i in range(5)]
        await until(lambda: llm.stats is not None and llm.stats.num_running == 5)
        if how == "kill -9":
            os.kill(pid, signal.SIGKILL)
        else:
            running.append(asyncio.create_task(llm.generate((DEADLY,), greedy(1))))
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(end, EngineDeadError) for end in ends)
        await until(lambda: llm.state is EngineState.LOADING)
        with pytest.raises(EngineUnavailableError):
            await llm.generate(PROMPT, greedy(1))
        await until(lambda: llm.state is EngineState.READY)
        assert llm.info.pid != pid
        assert llm.num_restarts == 1
        assert (await llm.generate(PROMPT, greedy(3))).token_ids == tuple(
            generate(PROMPT, 3, 0, VOCAB)
        )

    run(test, step_s=0.01)


def test_steps_that_go_on_failing_end_the_process_for_a_new_one() -> None:
    async def test(llm: AsyncLLM) -> None:
        for _ in range(5):
            end = await llm.generate((POISON_ALL,), greedy(1))
            assert end.finish_reason is FinishReason.ERROR
        await until(lambda: llm.num_restarts == 1)
        assert (await llm.generate(PROMPT, greedy(3))).finish_reason is FinishReason.LENGTH

    run(test)


def test_requests_that_fail_by_themselves_do_not_end_the_process() -> None:
    async def test(llm: AsyncLLM) -> None:
        for _ in range(12):
            end = await llm.generate((POISON,), greedy(1))
            assert end.finish_reason is FinishReason.ERROR
        assert (await llm.generate(PROMPT, greedy(3))).finish_reason is FinishReason.LENGTH
        assert llm.num_restarts == 0

    run(test)


def test_an_engine_that_cannot_start_says_why() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="turn this knob"):
            await toy_llm(error="turn this knob").start()
        with pytest.raises(ModelNotFoundError):
            await AsyncLLM("./no-such-model").start()

    asyncio.run(main())


def test_a_full_queue_refuses() -> None:
    async def test(llm: AsyncLLM) -> None:
        waiting = [asyncio.create_task(llm.generate(PROMPT, greedy(5))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="4 requests wait"):
            await llm.generate(PROMPT, greedy(5))
        await asyncio.gather(*waiting)
        assert (await llm.generate(PROMPT, greedy(1))).token_ids

    run(test, max_waiting=4, step_s=0.01)


def test_closing_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    async def main() -> None:
        llm = toy_llm(step_s=0.01)
        await llm.start()
        task = asyncio.create_task(llm.generate(PROMPT, greedy(20)))
        await until(lambda: llm.num_requests == 1)
        closing = asyncio.create_task(llm.close(drain_s=10))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError, match="draining"):
            await llm.generate(PROMPT, greedy(1))
        assert await closing
        assert (await task).finish_reason is FinishReason.LENGTH
        assert llm.state is EngineState.CLOSED

    asyncio.run(main())


def test_what_does_not_finish_in_time_gets_an_error_at_closing() -> None:
    async def main() -> None:
        llm = toy_llm(step_s=0.05)
        await llm.start()
        task = asyncio.create_task(llm.generate(PROMPT, greedy(400)))
        await until(lambda: llm.num_requests == 1)
        assert not await llm.close(drain_s=0.1)
        with pytest.raises(EngineUnavailableError):
            await task

    asyncio.run(main())


class _Watcher:
    def __init__(self) -> None:
        self.holder: dict[int, tuple[int, int, int]] = {}
        self.news: list[BlockNews] = []

    def stepped(self, stats: StepStats) -> None: ...

    def ended(self, stream: RequestStream) -> None: ...

    def started(self, info: EngineInfo) -> None: ...

    def blocks_changed(self, news: BlockNews) -> None:
        if news.everything:
            self.holder.clear()
        for block, *now in news.blocks:
            self.holder[block] = (now[0], now[1], now[2])
        self.news.append(news)


def test_watched_blocks_add_up_to_the_ledger() -> None:
    async def test(llm: AsyncLLM) -> None:
        watcher = _Watcher()
        llm.observers.append(watcher)
        streams = [await llm.submit((i, *PROMPT), greedy(300)) for i in range(4)]
        for stream in streams:
            await anext(stream)
        llm.watch_blocks(0.05)
        await until(lambda: len(watcher.news) > 5)
        assert watcher.news[0].everything
        assert not watcher.news[1].everything
        news = watcher.news[-1]
        held = {block: now for block, now in watcher.holder.items() if now[0] >= 0}
        assert sum(now[2] for now in held.values()) == news.stats.ledger.live
        assert {row.number for row in news.rows} == {now[0] for now in held.values()}
        tables: dict[str, tuple[int, ...]] = {}
        for each in watcher.news:
            for row in each.rows:
                tables[row.request_id] = tables.get(row.request_id, ())[: row.kept] + row.block_ids
        assert sorted(block for table in tables.values() for block in table) == sorted(held)
        block = tables[news.rows[0].request_id][0]
        facts = await llm.describe_block(block)
        assert facts is not None
        assert facts.holders == ((news.rows[0].request_id, 0),)
        assert facts.token_ids == (0, *PROMPT[:3])
        assert facts.hash is not None
        assert await llm.describe_block(10**6) is None
        for stream in streams:
            stream.cancel()
        await until(lambda: all(now[0] < 0 for now in watcher.holder.values()))
        assert watcher.news[-1].rows == ()

    run(test, step_s=0.005)


def test_an_engine_whose_front_is_gone_ends() -> None:
    script = (
        "import asyncio, os\n"
        "from tests.support.toy_process import toy_llm\n"
        "async def main():\n"
        "    llm = toy_llm(); await llm.start(); print(llm.info.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}")


def test_the_front_does_not_import_torch() -> None:
    code = "import sys, pagelab; pagelab.AsyncLLM; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_news_of_many_requests_are_handed_out_a_few_in_each_turn_of_the_event_loop() -> None:
    async def main() -> None:
        llm = toy_llm()
        streams = [
            RequestStream(
                str(i), None, (1,), greedy(1), [None],
                stop_sequence=lambda *_: None, cancel=lambda _: None,
            )
            for i in range(500)
        ]  # fmt: skip
        llm._streams = {stream.id: stream for stream in streams}
        names = tuple(llm._streams)
        token: tuple[Any, ...] = (0, 7, None, FinishReason.LENGTH, None, True)
        told: list[tuple[str, tuple[Any, ...], Callable[[RequestStream], bool]]] = [
            ("accepted", names, lambda stream: stream.accepted.done()),
            ("tokens", tuple((n, *token) for n in names), lambda stream: stream.has_tokens),
            (
                "ended",
                tuple((n, RequestMetrics(0.0)) for n in names),
                lambda stream: stream.metrics is not None,
            ),
        ]
        for field, news, has_it in told:
            changed: dict[str, Any] = {field: news}
            task = asyncio.ensure_future(llm._take_news(EMPTY_NEWS._replace(**changed)))
            before, most = 0, 0
            while not task.done():
                await asyncio.sleep(0)
                now = sum(map(has_it, streams))
                before, most = now, max(most, now - before)
            assert before == 500, field
            assert most <= A_TURN, field
        assert llm.num_requests == 0

    asyncio.run(main())
