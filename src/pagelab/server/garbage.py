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
from pagelab.engine.launch import EngineState

_LOOK_EVERY_S = 0.1

LONGEST_S = 600.0
"""A server that is never idle collects all the same, so often: errors may leave cycles."""

_NEVER = 1_000_000_000  # collections of the second generation before one of the third


async def collect_when_idle(llm: AsyncLLM, longest_s: float = LONGEST_S) -> None:
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
        gc.set_threshold(*thresholds[:2], _NEVER)
        gc.enable()
        collected, worked = time.monotonic(), False
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            worked = worked or llm.num_requests > 0
            overdue = time.monotonic() - collected > longest_s
            if worked and (overdue or llm.num_requests == 0):
                gc.collect()
                collected, worked = time.monotonic(), llm.num_requests > 0
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
