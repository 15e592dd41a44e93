"""The PagedAttention paper's memory figures, replayed through the real scheduler and allocators.

Source of the setting and of all figures called the paper's: Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023. OPT-13B on an A100 of
40 GB leaves 12 GiB for K/V: 15.7K slots of 800 KiB. The contiguous allocators hand out single
slots through a buddy system, paging blocks of 16.

The paper's request lengths are not public; ours are drawn from distributions with its means
(`pagelab.workloads.lengths`), or come from a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from pagelab.config import MemoryConfig
from pagelab.memory.ledger import LedgerShares
from pagelab.models.model_shape import shape_of_config
from pagelab.models.shapes import BUILT_IN
from pagelab.sim.cost_model import UNIT
from pagelab.sim.prices import card_roofline
from pagelab.sim.saturation import UNBOUNDED, SaturationResult, replay
from pagelab.sim.stream import StreamSummary, simulate_stream
from pagelab.workloads import RequestShape, ShapeOptions, open_shapes
from pagelab.workloads.arrivals import Rate

KV_BYTES = 12 << 30
SLOT_BYTES = 819_200  # 2 · 40 layers · 5,120 · 2 bytes
SLOTS = KV_BYTES // SLOT_BYTES
BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
WATERMARK = 0.01  # vLLM's own

SHAREGPT, ALPACA = "sharegpt-like", "alpaca-like"
ROWS = {
    "contiguous-max": "Orca (Max)",
    "contiguous-pow2": "Orca (Pow2)",
    "contiguous-oracle": "Orca (Oracle)",
    "paged": "vLLM",
}
STATES = ("live", "reserved", "internal", "external")
PAPER_SHARES: Mapping[str, tuple[float | None, ...]] = {
    "contiguous-max": (20.4, 13.3, 57.3, 8.9),
    "contiguous-pow2": (26.8, 17.9, 13.6, 41.6),
    "contiguous-oracle": (38.2, 25.2, None, 36.6),
    "paged": (96.3, None, None, None),
}
"""Fig. 2, percent of the pool: live, reserved, internal, external."""

PAPER_BATCH = {
    SHAREGPT: {
        "contiguous-max": 7.00,
        "contiguous-pow2": 9.81,
        "contiguous-oracle": 13.62,
        "paged": 30.42,
    },
    ALPACA: {
        "contiguous-max": 7.00,
        "contiguous-pow2": 43.24,
        "contiguous-oracle": 72.75,
        "paged": 132.44,
    },
}
"""Fig. 13, mean requests in a batch; ShareGPT at 2 requests a second, Alpaca at 30."""

PAPER_SAVED = {ALPACA: {2: 6.09, 4: 8.53, 6: 9.79}, SHAREGPT: {2: 16.2, 6: 30.5}}
"""Fig. 15, percent of blocks that sharing saves with parallel samples (ShareGPT: its range)."""

POINTS = 5.0  # what a state may differ by, of the pool
RATIO = 0.10  # what a batch may differ by
FILLED = 0.4  # of the pool, by fig15's arrivals


class Comparison(NamedTuple):
    """One figure beside the paper's. `within` is None where no bound is claimed."""

    row: str
    figure: str
    measured: float
    paper: float | None
    within: bool | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A figure of the paper, replayed."""

    figure: str
    title: str
    lengths: str  # what was replayed, with its means
    comparisons: tuple[Comparison, ...]


OnStart = Callable[[str], None]


def fig2(
    spec: str | None = None, *, seed: int = 0, on_start: OnStart | None = None
) -> Reproduction:
    """Fig. 2: where the pool goes, by allocator, on ShareGPT-like lengths.

    Args:
        spec: other lengths: a workload or a trace file.
        seed: of the generated lengths.
        on_start: told what runs.
    """
    lengths = _lengths(spec or SHAREGPT, seed)
    found: list[Comparison] = []
    for allocator, row in ROWS.items():
        result = _saturated(lengths, allocator, on_start)
        claimed = spec is None
        for state, paper in zip(STATES, PAPER_SHARES[allocator], strict=True):
            measured = 100 * float(getattr(result.ledger, state))
            within = abs(measured - paper) <= POINTS if claimed and paper is not None else None
            found.append(Comparison(row, f"{state} %", measured, paper, within))
        note = ""
        if allocator.startswith("contiguous"):
            note = f"external: {100 * result.ledger.rounding:.1f} is the buddy's rounding up"
        else:
            note = (
                f"free {100 * result.ledger.free:.1f}; {result.preemptions_per_request:.2f} "
                f"preemptions a request, {result.recomputed_per_output_token:.2f} tokens computed "
                "again for each one generated"
            )
        paper = PAPER_BATCH[SHAREGPT][allocator]
        found.append(_batch(row, result.mean_running, paper, claimed, note))
    return Reproduction(
        "fig2", "Where the KV pool goes, at saturation", _means(lengths), tuple(found)
    )


def fig13(
    spec: str | None = None, *, seed: int = 0, on_start: OnStart | None = None
) -> Reproduction:
    """Fig. 13: requests in a batch, by allocator, on ShareGPT-like and Alpaca-like lengths.

    At saturation. The paper's Alpaca run, at 30 requests a second, was not saturated under
    paging: a last row has that rate, with the steps of a roofline.
    """
    found: list[Comparison] = []
    texts: list[str] = []
    for name in (SHAREGPT, ALPACA) if spec is None else (spec,):
        lengths = _lengths(name, seed)
        texts.append(_means(lengths))
        for allocator, row in ROWS.items():
            paper = PAPER_BATCH.get(name, {}).get(allocator)
            result = _saturated(lengths, allocator, on_start)
            claimed = name == SHAREGPT
            note = "" if claimed or paper is None else _unsaturated(result.mean_running, paper)
            if claimed and allocator == "paged" and paper is not None:
                filled = paper * _mean_held(lengths) / SLOTS
                note = f"the paper's batch of our requests would fill {filled:.0%} of the pool"
            found.append(
                _batch(f"{name}: {row}", result.mean_running, paper, claimed, note, "saturated")
            )
        if name == ALPACA:
            found.append(_alpaca_at_30(lengths, seed, on_start))
    return Reproduction("fig13", "Requests in a batch", "; ".join(texts), tuple(found))


def fig15(
    spec: str | None = None, *, seed: int = 0, on_start: OnStart | None = None
) -> Reproduction:
    """Fig. 15: blocks that sharing the prompt saves, with 2, 4 and 6 parallel samples.

    Requests arrive at a rate that fills two fifths of the pool, so that a prompt's samples run
    together. At saturation they wait for each other's blocks and are preempted one by one, and
    share less (docs/simulator.md).
    """
    found: list[Comparison] = []
    texts: list[str] = []
    for name in (ALPACA, SHAREGPT) if spec is None else (spec,):
        lengths = _lengths(name, seed)
        texts.append(_means(lengths))
        for n in (2, 4, 6):
            if on_start is not None:
                on_start(f"{name}, {n} samples")
            ledger = _not_saturated(lengths, n, seed)
            held = ledger.live + ledger.reserved + ledger.internal + ledger.shared_saved
            measured = 100 * ledger.shared_saved / held
            paper = PAPER_SAVED.get(name, {}).get(n)
            within = None if paper is None else abs(measured - paper) <= POINTS
            note = f"formula {100 * saved_share(lengths, n):.1f}"
            found.append(Comparison(f"{name}: n = {n}", "saved %", measured, paper, within, note))
    return Reproduction(
        "fig15", "What parallel samples save by sharing", "; ".join(texts), tuple(found)
    )


FIGURES: Mapping[str, Callable[..., Reproduction]] = {"fig2": fig2, "fig13": fig13, "fig15": fig15}


def saved_share(lengths: list[RequestShape], n: int) -> float:
    """Slots that n samples of one prompt save, of those that they would hold alone.

    `(n−1)/n · (E[o·B·⌊i/B⌋]/E[o]) / (mean tokens of a running request + (B−1)/2)`, weighted by
    the time in the pool (docs/planner.md has the mean).
    """
    outputs = fmean(s.output_tokens for s in lengths)
    shared = fmean(s.output_tokens * (s.input_tokens // BLOCK_SIZE) * BLOCK_SIZE for s in lengths)
    return (n - 1) / n * (shared / outputs) / _mean_held(lengths)


def _mean_held(lengths: list[RequestShape]) -> float:
    """Slots that a running sequence holds on average under paging, sharing nothing."""
    outputs = fmean(s.output_tokens for s in lengths)
    tokens = (
        fmean(s.input_tokens * s.output_tokens for s in lengths) / outputs
        + fmean(s.output_tokens**2 for s in lengths) / (2 * outputs)
        - 0.5
    )
    return tokens + (BLOCK_SIZE - 1) / 2


def _lengths(spec: str, seed: int) -> list[RequestShape]:
    count = {SHAREGPT: 2000, ALPACA: 4000}.get(spec)
    options = ShapeOptions(num_requests=count, max_model_len=MAX_MODEL_LEN, too_long="drop")
    return list(open_shapes(spec, seed=seed, options=options))


def _means(lengths: list[RequestShape]) -> str:
    inputs = fmean(s.input_tokens for s in lengths)
    outputs = fmean(s.output_tokens for s in lengths)
    return f"{len(lengths):,} requests, mean {inputs:.1f} tokens in, {outputs:.1f} out"


def _memory(allocator: str) -> MemoryConfig:
    block_size = BLOCK_SIZE if allocator == "paged" else 1
    return MemoryConfig(
        num_blocks=SLOTS // block_size,
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        allocator=allocator,
        placement="buddy",
        prefix_caching=False,
        watermark=WATERMARK,
    )


def _saturated(
    lengths: list[RequestShape], allocator: str, on_start: OnStart | None
) -> SaturationResult:
    if on_start is not None:
        on_start(f"{ROWS[allocator]} at saturation")
    # a few hundred requests are many where seven run at a time
    most = 600 if allocator == "contiguous-max" else len(lengths)
    return replay(lengths, _memory(allocator), max_requests=most)


def _not_saturated(lengths: list[RequestShape], n: int, seed: int) -> LedgerShares:
    """The pool's shares with n samples of each prompt, where nobody waits; steps of a second."""
    held = _mean_held(lengths)
    some = lengths[: 2000 if held < 200 else 800]
    running = FILLED * SLOTS / held
    rate = running / (n * fmean(s.output_tokens for s in lengths))
    arrivals = Rate("poisson", rate).apply(iter(some), seed)
    return simulate_stream(arrivals, _memory("paged"), UNBOUNDED, cost=UNIT, samples=n).ledger


def _at_rate(name: str, seed: int, rate: float) -> StreamSummary:
    """Paging at so many requests a second on the paper's card, its steps as quick as could be."""
    options = ShapeOptions(num_requests=4000, rate=f"poisson:{rate:g}", max_model_len=MAX_MODEL_LEN)
    model = shape_of_config(BUILT_IN["opt-13b"], Path("built-in"), "opt-13b")
    cost = card_roofline("a100-40", model, "float16")
    stream = open_shapes(name, seed=seed, options=options)
    return simulate_stream(stream, _memory("paged"), UNBOUNDED, cost=cost)


def _batch(
    row: str,
    measured: float,
    paper: float | None,
    claimed: bool,
    note: str,
    figure: str = "batch",
) -> Comparison:
    within = None
    if claimed and paper is not None and "vLLM" not in row:
        within = abs(measured / paper - 1) <= RATIO
    return Comparison(row, figure, measured, paper, within, note)


def _alpaca_at_30(lengths: list[RequestShape], seed: int, on_start: OnStart | None) -> Comparison:
    if on_start is not None:
        on_start("vLLM at 30 requests a second")
    found = _at_rate(ALPACA, seed, 30.0)
    paper = PAPER_BATCH[ALPACA]["paged"]
    a_token = paper / (30.0 * fmean(s.output_tokens for s in lengths))
    note = (
        f"a token takes {1000 * found.tpot.mean:.0f} ms at the card's limits; the paper's batch "
        f"means {1000 * a_token:.0f} ms (Little's law), so its steps took longer"
    )
    row = f"{ALPACA}: {ROWS['paged']}"
    return _batch(row, found.mean_running, paper, False, note, "30 a second")


def _unsaturated(measured: float, paper: float) -> str:
    if measured > paper * (1 + RATIO):
        return "the paper's run had fewer requests waiting than could have run"
    if measured < paper * (1 - RATIO):
        return "our lengths, drawn from the paper's means alone, fill less"
    return ""
