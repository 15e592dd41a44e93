"""Four seconds of chaos; `benchmarks/serve_chaos.py` is the long run."""

from __future__ import annotations

import asyncio
import os
import signal

from tests.support.chaos import chaos, settle
from tests.support.toy_process import VOCAB, toy_tokenizer
from tests.support.toy_runner import generate
from tests.support.toy_server import running


def expected(prompt: str, count: int) -> str:
    tokenizer = toy_tokenizer()
    return tokenizer.decode(generate(tokenizer.encode(prompt), count, 0, VOCAB))


def test_after_chaos_no_slot_is_held_and_the_next_request_is_answered() -> None:
    with running(step_s=0.002) as server:

        async def main() -> None:
            outcome = await chaos(
                server.port,
                expected,
                lambda: os.kill(server.llm.info.pid, signal.SIGKILL),
                seconds=4,
            )
            await settle(server.port, expected, outcome)
            assert not outcome.wrong
            assert outcome.counts["right answers"] > 5
            for kind in ("clients that vanished", "slow readers", "half-open sockets", "garbage",
                         "oversize bodies", "engines killed"):  # fmt: skip
                assert outcome.counts[kind] > 0, kind

        asyncio.run(main())
        assert server.llm.num_requests == server.llm.num_waiting == 0
        assert server.llm.num_restarts == 1
