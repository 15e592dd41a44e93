"""What an engine in a process of its own and the process in front of it say to each other.

::

    front (AsyncLLM, no torch)                  engine (engine.worker_process)
      │ ── Start ────────────────────────────────────▶ │  loads the model
      │ ◀───────────────── EngineInfo or StartFailed ─ │
      │ ── AddRequest, CancelRequest, StopSequence ──▶ │  taken between two steps
      │ ◀─────────────────────────────────────── News ─ │  after every step
      │ ── WatchBlocks, DescribeBlock ────────────────▶ │  only while somebody looks
      │ ◀──────────────────── BlockNews, BlockFacts ── │
      │ ── Shutdown, or the socket closes ───────────▶ │  ends

Plain picklable data over a socket pair that only these two have. A frame is the length of the
pickle (4 bytes, big-endian) and the pickle.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from pagelab.memory.ledger import LedgerEntry
from pagelab.types import FinishReason, RequestMetrics, SamplingParams, TokenLogprobs

HEADER = struct.Struct(">I")

TokenNews = tuple[str, int, int | None, TokenLogprobs | None, FinishReason | None, str | None, bool]
"""(request id, sample, token id, log probabilities, why it ended, error, whether the token is part
of the text) of one sequence; the end-of-sequence token that ended it is not.

A plain tuple: hundreds are pickled every step, and a NamedTuple costs three times as much.
"""


class Start(NamedTuple):
    """The first message: what to load. `factory` is `module:function`, called with `options`."""

    factory: str
    options: Mapping[str, Any]


class AddRequest(NamedTuple):
    """Queue a request; `arrival_time` is in seconds of `time.perf_counter`, which both share."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int
    arrival_time: float


class CancelRequest(NamedTuple):
    """Nobody wants this request's tokens any more."""

    request_id: str


class StopSequence(NamedTuple):
    """A stop string was found in this sequence's text."""

    request_id: str
    sample: int


class WatchBlocks(NamedTuple):
    """Send `BlockNews` this often, in seconds, beginning with everything; None: stop."""

    every_s: float | None


class DescribeBlock(NamedTuple):
    """Answer with the `BlockFacts` of a block."""

    block_id: int


class Shutdown(NamedTuple):
    """End, whatever runs."""


class EngineInfo(NamedTuple):
    """What was loaded. Sizes in bytes, lengths in tokens."""

    model: str
    pid: int
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    block_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    allocator: str
    prefix_caching: bool
    device: str
    dtype: str
    load_s: float


class StartFailed(NamedTuple):
    """The engine could not be made; the name of our error's class, and its words."""

    error: str
    message: str


class StepStats(NamedTuple):
    """The engine after a step. Counters run since its start; times in seconds."""

    step: int
    time: float
    step_s: float  # how long the last step took
    steps_s: float  # of all steps
    runner_s: float  # of that, waiting for the model
    num_tokens: int  # of the last step
    total_tokens: int  # of all steps, prompts included
    num_running: int
    num_waiting: int
    ledger: LedgerEntry
    num_preemptions: int
    recomputed_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int


class News(NamedTuple):
    """What happened since the last one."""

    accepted: tuple[str, ...]
    refused: tuple[tuple[str, str, str], ...]  # (request id, error's class, message)
    prompts: tuple[tuple[str, tuple[TokenLogprobs | None, ...]], ...]  # their log probabilities
    tokens: tuple[TokenNews, ...]
    ended: tuple[tuple[str, RequestMetrics], ...]
    stats: StepStats


class RequestRow(NamedTuple):
    """One sequence in the page map's list.

    Its block table is the first `kept` blocks of what the row before said, then `block_ids`.
    """

    number: int
    request_id: str
    sample: int
    status: str
    prompt_tokens: int
    output_tokens: int
    max_tokens: int  # of the output
    computed_tokens: int
    cached_tokens: int
    preemptions: int
    arrival_time: float
    kept: int
    block_ids: tuple[int, ...]


class BlockNews(NamedTuple):
    """Who holds which blocks, as far as it changed.

    `blocks` has (block, holder, reference count, written slots); a holder is a request's number,
    -1 for a free block and -2 for a cached one. `rows` lists what runs, then what waits, in order
    of service; `num_unlisted` more wait.
    """

    everything: bool
    blocks: tuple[tuple[int, int, int, int], ...]
    rows: tuple[RequestRow, ...]
    num_unlisted: int
    stats: StepStats


class BlockFacts(NamedTuple):
    """One block, looked at closely. `hash` is hexadecimal; None where there is none."""

    block_id: int
    ref_count: int
    written: int
    hash: str | None
    holders: tuple[tuple[str, int], ...]  # (request id, sample), at most ten
    position: int | None  # of its first slot in the first holder's tokens
    token_ids: tuple[int, ...]


def frame(message: object) -> bytes:
    """A message as it goes over the socket."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def unframe(body: bytes) -> Any:
    """The message in a frame's body."""
    return pickle.loads(body)
