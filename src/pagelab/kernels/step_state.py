"""A step's inputs, made on the device from what each sequence's row says.

One row a running sequence, kept from step to step::

    row | next_token | computed | output_index | block_table ············
        | what to feed next     | tokens whose K/V is in the cache
                      | index of the token that is sampled next

`begin_decode` reads the rows and makes the inputs of a step in which every sequence brings one
token; `advance` writes the sampled tokens back. Between the two nothing comes from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagelab.kernels.decode_items import PART, DecodePlan, shortest_item
from pagelab.kernels.launch import Device, begin
from pagelab.kernels.linear import Peaks
from pagelab.kernels.mailbox import Mailbox, deliver
from pagelab.kernels.row_stats import RowStats


@triton.jit
def _embed(
    token,
    position,
    to,
    embedding,
    position_embedding,
    cos,
    sin,
    frequencies,
    stats,
    stat_blocks,
    i,
    hidden,
    LEARNED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    STATS: tl.constexpr,
    STAT_WIDTH: tl.constexpr,
):
    j = tl.arange(0, BLOCK)
    x = tl.load(embedding + token.to(tl.int64) * hidden + j, mask=j < hidden, other=0.0)
    if LEARNED:
        p = tl.load(
            position_embedding + position.to(tl.int64) * hidden + j, mask=j < hidden, other=0.0
        )
        x = (x.to(tl.float32) + p.to(tl.float32)).to(x.dtype)
    tl.store(to + i.to(tl.int64) * hidden + j, x, mask=j < hidden)
    if STATS > 0:  # all in the first block
        b = tl.arange(0, triton.next_power_of_2(STAT_WIDTH))
        wide = x.to(tl.float32)
        at = stats + i.to(tl.int64) * (2 * STAT_WIDTH) + b
        tl.store(at, tl.where(b == 0, tl.sum(wide * wide, 0), 0.0), mask=b < stat_blocks)
        if STATS == 2:
            tl.store(at + STAT_WIDTH, tl.where(b == 0, tl.sum(wide, 0), 0.0), mask=b < stat_blocks)
    if not LEARNED:
        k = tl.arange(0, BLOCK_HALF)
        angle = position.to(tl.float32) * tl.load(frequencies + k, mask=k < HALF, other=0.0)
        tl.store(cos + i * HALF + k, tl.cos(angle), mask=k < HALF)
        tl.store(sin + i * HALF + k, tl.sin(angle), mask=k < HALF)


@triton.jit
def _plan_items(
    rows,
    computed,
    items,
    num_items,
    num_seqs,
    target,
    shortest,
    PART: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i = tl.arange(0, BLOCK_S)
    live = i < num_seqs
    row = tl.load(rows + i, mask=live, other=0)
    position = tl.load(computed + row, mask=live, other=-1)
    length = position + 1
    each = tl.maximum(tl.cdiv(tl.sum(length), target), shortest)
    each = tl.cdiv(each, 64) * 64
    # a sequence's items are about as long as each other; padding is as long as one key
    length = tl.maximum(length, 1)
    part = tl.cdiv(tl.cdiv(length, tl.cdiv(length, each)), PART) * PART
    count = tl.where(live, tl.cdiv(length, part), 0)
    first = tl.cumsum(count, 0) - count
    tl.store(num_items, tl.sum(count))
    for c in range(tl.max(count)):
        at = items + (first + c) * 8
        here = c < count
        tl.store(at, i, mask=here)
        tl.store(at + 1, i, mask=here)
        tl.store(at + 2, row, mask=here)
        tl.store(at + 3, c * part, mask=here)
        tl.store(at + 4, tl.minimum((c + 1) * part, length), mask=here)
        tl.store(at + 5, tl.zeros([BLOCK_S], tl.int32) + c, mask=here)
        tl.store(at + 6, count, mask=here)
        tl.store(at + 7, position, mask=here)


@triton.jit(do_not_specialize=["num_seqs", "target", "shortest", "stat_blocks"])
def _begin_decode(
    rows,
    next_token,
    computed,
    x,
    embedding,
    position_embedding,
    cos,
    sin,
    frequencies,
    stats,
    items,
    num_items,
    num_seqs,
    target,
    shortest,
    stat_blocks,
    hidden,
    LEARNED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    STATS: tl.constexpr,
    STAT_WIDTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0)
    if i == num_seqs:
        _plan_items(rows, computed, items, num_items, num_seqs, target, shortest, PART, BLOCK_S)
    else:
        row = tl.load(rows + i)
        _embed(
            tl.load(next_token + row),
            tl.load(computed + row),
            x,
            embedding,
            position_embedding,
            cos,
            sin,
            frequencies,
            stats,
            stat_blocks,
            i,
            hidden,
            LEARNED,
            HALF,
            BLOCK,
            BLOCK_HALF,
            STATS,
            STAT_WIDTH,
        )


@triton.jit(do_not_specialize=["stat_blocks"])
def _begin_ragged(
    token_ids,
    token_rows,
    positions,
    next_token,
    x,
    embedding,
    position_embedding,
    cos,
    sin,
    frequencies,
    stats,
    stat_blocks,
    hidden,
    LEARNED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    STATS: tl.constexpr,
    STAT_WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0)
    token = tl.load(token_ids + i)
    row = tl.load(token_rows + i)
    if token < 0:  # the host does not know it yet
        token = tl.load(next_token + row)
    _embed(
        token,
        tl.load(positions + i),
        x,
        embedding,
        position_embedding,
        cos,
        sin,
        frequencies,
        stats,
        stat_blocks,
        i,
        hidden,
        LEARNED,
        HALF,
        BLOCK,
        BLOCK_HALF,
        STATS,
        STAT_WIDTH,
    )


@triton.jit(do_not_specialize=["num_seqs"])
def _advance(
    rows,
    samples,
    counts,
    tokens,
    usable,
    finite,
    next_token,
    computed,
    output_index,
    upload,
    box,
    turn,
    box_stride,
    num_seqs,
    scratch,
    DECODE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tl.store(upload, 0)  # what the host changed is done: the next step does not do it again
    i = tl.arange(0, BLOCK_S)
    live = i < num_seqs
    token = tl.load(tokens + i, mask=live, other=0)
    deliver(
        box,
        turn,
        box_stride,
        i,
        token,
        tl.load(usable + i, mask=live, other=0),
        tl.load(finite + i, mask=live, other=0),
        live,
    )
    row = tl.load(rows + i, mask=live, other=0)
    live = live & (row != scratch)
    before = tl.load(computed + row, mask=live, other=0)
    if DECODE:
        tl.store(computed + row, before + 1, mask=live)
        sampled = live
    else:
        count = tl.load(counts + i, mask=live, other=0)
        tl.store(computed + row, before + count, mask=live)
        sampled = live & (tl.load(samples + i, mask=live, other=0) != 0)
    tl.store(next_token + row, token, mask=sampled)
    index = tl.load(output_index + row, mask=sampled, other=0)
    tl.store(output_index + row, index + 1, mask=sampled)


@triton.jit(do_not_specialize=["blocks"])
def _pick(
    peaks,
    best,
    blocks,
    rows,
    next_token,
    computed,
    output_index,
    tokens,
    usable,
    finite,
    upload,
    box,
    turn,
    box_stride,
    scratch,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0)
    if i == 0:
        tl.store(upload, 0)
    b = tl.arange(0, BLOCKS)
    peak = tl.load(peaks + i * blocks + b, mask=b < blocks, other=float("-inf"))
    nan = tl.max(tl.where(peak == peak, 0, 1), 0)
    highest, at = tl.max(tl.where(peak == peak, peak, float("-inf")), 0, return_indices=True)
    fine = (nan == 0) & (tl.abs(highest) < float("inf"))
    token = tl.where(fine, tl.load(best + i * blocks + at), 0)
    tl.store(usable + i, fine.to(tl.int32))
    tl.store(tokens + i, token)
    deliver(box, turn, box_stride, i, token, fine.to(tl.int32), tl.load(finite + i), True)
    row = tl.load(rows + i)
    if row != scratch:
        tl.store(next_token + row, token)
        tl.store(computed + row, tl.load(computed + row) + 1)
        tl.store(output_index + row, tl.load(output_index + row) + 1)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What turns a token and its position into the first hidden state.

    Attributes:
        tokens: `[vocab, hidden]`.
        positions: `[max_position, hidden]`, where positions are learned.
        frequencies: `[D / 2]` float32, where they are rotary.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    frequencies: torch.Tensor | None

    def arguments(self) -> tuple[int, bool, int, int, int]:
        """hidden, LEARNED, HALF, BLOCK, BLOCK_HALF of the kernels."""
        hidden = self.tokens.shape[1]
        half = 1 if self.frequencies is None else len(self.frequencies)
        return (
            hidden,
            self.positions is not None,
            half,
            triton.next_power_of_2(hidden),
            triton.next_power_of_2(half),
        )


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """The rows of all sequences; the last one is the scratch row, for padding.

    Attributes:
        next_token, computed, output_index: `[R]` int32.
        block_tables: `[R, blocks]` int32.
    """

    next_token: torch.Tensor
    computed: torch.Tensor
    output_index: torch.Tensor
    block_tables: torch.Tensor

    @property
    def scratch(self) -> int:
        """Index of the row that padding uses."""
        return len(self.next_token) - 1


def _stats_constants(stats: RowStats | None) -> tuple[int, int]:
    """STATS, STAT_WIDTH of the kernels."""
    return (0, 1) if stats is None else (2 if stats.layer else 1, stats.width)


def begin_decode(
    rows: torch.Tensor,
    state: SequenceRows,
    embeddings: Embeddings,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    plan: DecodePlan,
    device: Device,
    *,
    shortest: int | None = None,
    stats: RowStats | None = None,
) -> None:
    """Inputs of a step with one token for each of `rows` `[S]` int32.

    Writes x `[S, hidden]`, cos and sin `[S, D / 2]` float32, and the plan's items, of `shortest`
    keys at least (None: as `decode_items` says). With `stats` also x's sums, all in the first of
    as many blocks as it says.
    """
    if shortest is None:
        shortest = shortest_item(len(rows), plan.target_items)
    hidden, *constants = embeddings.arguments()
    tokens = embeddings.tokens
    device.launch(
        _begin_decode,
        (len(rows) + 1,),
        rows,
        state.next_token,
        state.computed,
        x,
        tokens,
        tokens if embeddings.positions is None else embeddings.positions,
        cos,
        sin,
        cos if embeddings.frequencies is None else embeddings.frequencies,
        cos if stats is None else stats.values,
        plan.items,
        plan.num_items,
        len(rows),
        plan.target_items,
        shortest,
        1 if stats is None else stats.blocks,
        hidden,
        *constants,
        *_stats_constants(stats),
        PART,
        triton.next_power_of_2(plan.max_seqs),
        device.pdl,
        num_warps=4,
    )


def begin_ragged(
    token_ids: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    state: SequenceRows,
    embeddings: Embeddings,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    device: Device,
    *,
    stats: RowStats | None = None,
) -> None:
    """The same for T tokens that the host describes, all int32 `[T]`.

    A token id of -1 is the one that its row's sequence sampled last.
    """
    hidden, *constants = embeddings.arguments()
    tokens = embeddings.tokens
    device.launch(
        _begin_ragged,
        (len(token_ids),),
        token_ids,
        token_rows,
        positions,
        state.next_token,
        x,
        tokens,
        tokens if embeddings.positions is None else embeddings.positions,
        cos,
        sin,
        cos if embeddings.frequencies is None else embeddings.frequencies,
        cos if stats is None else stats.values,
        1 if stats is None else stats.blocks,
        hidden,
        *constants,
        *_stats_constants(stats),
        device.pdl,
        num_warps=4,
    )


def advance(
    rows: torch.Tensor,
    results: torch.Tensor,
    state: SequenceRows,
    upload: torch.Tensor,
    mailbox: Mailbox,
    device: Device,
    *,
    samples: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """Write a step's sampled tokens into the rows, count what was computed, hand the results to
    the host, and mark the upload (`updates`) as applied.

    Args:
        results: `[3, S]` int32: tokens, usable, finite.
        samples, counts: `[S]`, who sampled and how many tokens each brought; without them
            everyone brought one and sampled.
    """
    tokens, usable, finite = results
    device.launch(
        _advance,
        (1,),
        rows,
        rows if samples is None else samples,
        rows if counts is None else counts,
        tokens,
        usable,
        finite,
        state.next_token,
        state.computed,
        state.output_index,
        upload,
        mailbox.words,
        mailbox.turn,
        mailbox.words.shape[2],
        len(rows),
        state.scratch,
        samples is None,
        triton.next_power_of_2(len(state.next_token)),
        device.pdl,
        num_warps=4,
    )


def pick_and_advance(
    peaks: Peaks,
    blocks: int,
    rows: torch.Tensor,
    state: SequenceRows,
    results: torch.Tensor,
    upload: torch.Tensor,
    mailbox: Mailbox,
    device: Device,
) -> None:
    """The greedy end of a decode step: the best token of each row, written back as `advance` does.

    Args:
        peaks: of the logits, of `blocks` blocks a row (`linear`).
        results: `[3, S]` int32: tokens and usable are written (see `sampling.sample_tokens`),
            finite is read.
    """
    tokens, usable, finite = results
    device.launch(
        _pick,
        (len(rows),),
        peaks.values,
        peaks.tokens,
        blocks,
        rows,
        state.next_token,
        state.computed,
        state.output_index,
        tokens,
        usable,
        finite,
        upload,
        mailbox.words,
        mailbox.turn,
        mailbox.words.shape[2],
        state.scratch,
        triton.next_power_of_2(blocks),
        device.pdl,
        num_warps=4,
    )
