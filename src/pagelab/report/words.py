"""The words of a report: what the ledger's states and the measures mean, and their letters."""

from __future__ import annotations

from typing import NamedTuple

from pagelab.results import LedgerShare


class State(NamedTuple):
    """One state of the ledger."""

    name: LedgerShare
    letter: str
    fill: str  # a character for bars in a terminal
    meaning: str


# The ledger's order, which is also the order of stacking. Meanings: docs/ledger.md.
STATES = (
    State("live", "L", "█", "holds the K/V of a running request's token"),
    State("reserved", "R", "▓", "allocated, still empty, written later by its request"),
    State("internal", "I", "▒", "allocated and never written: over-reservation, ends of blocks"),
    State("cached", "C", "=", "held by nobody, kept for reuse as a prefix, taken back at once"),
    State("free", "F", "·", "in no allocation and available"),
    State(
        "external",
        "X",
        "░",
        "in no allocation, but in holes too small for the next request, or lost by rounding a "
        "range up",
    ),
)

GLOSSARY = (
    (
        "KV cache",
        "The keys and values of every token a running request has seen. Attention reads them at "
        "every step, so they must stay in memory for as long as the request runs.",
    ),
    ("KV pool", "The memory set aside for K/V, as slots. All requests share it."),
    ("slot", "Room for the K/V of one token, in every layer."),
    ("block", "A fixed number of slots. Paging hands memory out block by block."),
    (
        "paging",
        "A request gets a block when its tokens need one, anywhere in the pool, and a block table "
        "remembers where. The traditional way reserves one contiguous range of the maximum length "
        "before the first token.",
    ),
    ("step", "One pass through the model, for all running requests together."),
    ("output tokens a second", "Tokens generated, over the time from first arrival to last token."),
    ("TTFT", "Time to first token: from a request's arrival, the wait in the queue included."),
    ("ITL", "Inter-token latency: every gap between a request's tokens, pooled."),
    ("TPOT", "Time per output token of a request, after its first: (E2E − TTFT) / (tokens − 1)."),
    ("E2E", "End to end: from a request's arrival to its last token."),
    ("objective", "What a service promises: a limit for TTFT, TPOT or E2E."),
    ("goodput", "Requests a second that met every stated objective."),
    ("p50, p95, p99", "Half, 95 % and 99 % of the values are at or below this one."),
    ("running at once", "Requests that hold K/V and are being computed in the same step."),
    ("live share", "Live slots as a share of the pool, averaged over the time of the workload."),
    (
        "base cell",
        "The first value of every setting that was varied. Charts over time show it; the sweeps "
        "change one setting and leave the others at the base.",
    ),
    ("watermark", "The share of the blocks that admission leaves free for requests to grow into."),
    (
        "placement",
        "How a contiguous allocator chooses its range: buddy (sizes rounded up to a power of two, "
        "as the PagedAttention paper assumes) or first-fit (the first hole that is large enough).",
    ),
    (
        "simulated",
        "The real scheduler and allocators ran under a virtual clock; a cost model says how long "
        "a step takes. No model computed anything.",
    ),
    (
        "preemption",
        "The pool is full, so the latest request gives its blocks back and waits. What it had "
        "computed is computed again later.",
    ),
    ("RSS", "Resident memory of the method's process and its children, model included."),
    ("internal fragmentation", "Slots that belong to a request and are never written."),
    (
        "external fragmentation",
        "Slots that belong to nobody but lie in holes too small to use, and those that a buddy "
        "placement lost by rounding a range up.",
    ),
)
