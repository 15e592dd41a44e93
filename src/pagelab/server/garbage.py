"""When Python looks for garbage: never while a thousand clients wait for it.

A full collection goes through every object that there is and stops the event loop meanwhile: 60 ms
for the libraries and the tokenizer alone, 130 ms with the requests of 1,000 clients. Requests leave
nothing for it to find (reference counts free them), so it can be put off until nobody is there.
"""

from __future__ import annotations

import asyncio
import gc
import time

from pagelab.engine.async_llm import AsyncLLM
from pagelab.engine.garbage import NEVER
from pagelab.engine.launch import EngineState

_LOOK_EVERY_S = 0.1

IDLE_S = 1.0
"""How long nobody must have asked: connections are still being closed after the last token."""

LONGEST_S = 600.0
"""A server that is never idle collects all the same, so often: errors may leave cycles."""


async def collect_when_idle(
    llm: AsyncLLM, *, idle_s: float = IDLE_S, longest_s: float = LONGEST_S
) -> None:
    """Take Python's full collections over, until cancelled. For a process that only serves.

    What is there once the model is loaded stays for good and is not looked at again (`gc.freeze`).
    Young objects are collected as ever: that takes a millisecond or two.
    """
    thresholds = gc.get_threshold()
    gc.disable()  # loading makes much and throws little away
    try:
        while llm.state is EngineState.LOADING:
            await asyncio.sleep(_LOOK_EVERY_S)
        gc.freeze()
        gc.set_threshold(*thresholds[:2], NEVER)
        gc.enable()
        busy = collected = time.monotonic()  # when somebody was last there, when it last was done
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            if llm.num_requests > 0:
                busy = now
            is_idle = now - busy > idle_s
            if busy > collected and (is_idle or now - collected > longest_s):
                gc.collect()
                collected = time.monotonic()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
