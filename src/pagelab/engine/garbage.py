"""When Python looks for garbage.

A full collection goes through every object that there is: 60 to 140 ms with torch and Triton
loaded, in which a GPU finishes its work and waits. Requests leave nothing for it to find (reference
counts free them), so it can be put off.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 1_000_000_000
"""Collections of the second generation before one of the third."""


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Put full collections off until the end. Young objects are collected as ever."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
