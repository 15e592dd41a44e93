"""An out-of-memory of torch or the driver, said in our words: what, how much, which option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from pagelab.config import format_bytes
from pagelab.errors import InsufficientMemoryError
from pagelab.scheduling.batch import Batch

WEIGHTS = (
    "choose a smaller --dtype or another --device, or lower --kv-memory or "
    "--gpu-memory-utilization, whose K/V pool is there already"
)
POOL = "lower --kv-memory or --gpu-memory-utilization"
STEP = (
    "lower --max-num-batched-tokens or --max-num-seqs, or leave more beside the K/V pool by "
    "lowering --gpu-memory-utilization or --kv-memory"
)

_SIGNS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE
)
_ASKED = re.compile(r"tried to allocate ([0-9.]+ [KMGT]?i?B|[0-9]+ bytes)", re.IGNORECASE)


@contextmanager
def out_of_memory(doing: str, device: torch.device, knobs: str) -> Iterator[None]:
    """Turn an out-of-memory inside into an `InsufficientMemoryError`; other errors pass.

    Args:
        doing: what was done, for the message: `while loading the weights`.
        device: where.
        knobs: which options to change: `WEIGHTS`, `POOL`, `STEP`.
    """
    try:
        yield
    except InsufficientMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        cause = _cause(error)
        if cause is None:
            raise
        asked = _ASKED.search(str(cause))
        more = f", asking for {asked[1]}" if asked else ""
        raise InsufficientMemoryError(
            f"no memory left on {device} {doing}{more}{_free(device)}: {knobs}"
        ) from error


def in_step(batch: Batch, device: torch.device) -> AbstractContextManager[None]:
    """`out_of_memory` around a step: its requests end with the error, the engine goes on."""
    return out_of_memory(
        f"in a step of {batch.num_tokens:,} tokens and {len(batch.sequences):,} sequences",
        device,
        STEP,
    )


def _cause(error: BaseException) -> BaseException | None:
    """The out-of-memory in an error's chain: ending a broken graph capture hides it."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, torch.OutOfMemoryError | MemoryError) or _SIGNS.search(str(at)):
            return at
        at = at.__cause__ or at.__context__
    return None


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return ""
    return f" ({format_bytes(free)} of {format_bytes(total)} are free)"
