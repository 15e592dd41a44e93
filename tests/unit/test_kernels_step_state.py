"""The first and the last kernels of a step, and the changes that the host sends before it."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.decode_items import DecodePlan, cut_items
from pagelab.kernels.launch import device_of
from pagelab.kernels.mailbox import Mailbox
from pagelab.kernels.row_stats import RowStats
from pagelab.kernels.step_state import (
    Embeddings,
    SequenceRows,
    advance,
    begin_decode,
    begin_ragged,
)
from pagelab.kernels.updates import apply_updates
from tests.support.paged import DEVICE, HALF, synchronize

LAUNCH = device_of(DEVICE)
VOCAB, HIDDEN, HALF_DIM, ROWS = 50, 72, 20, 12
SCRATCH = ROWS - 1


def words(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def some_rows() -> SequenceRows:
    """Rows with tokens and positions that tell them apart; the scratch row is at position 0."""
    rng = random.Random(0)
    computed = [rng.randrange(400) for _ in range(SCRATCH)] + [0]
    return SequenceRows(
        words(*rng.sample(range(VOCAB), ROWS)),
        words(*computed),
        words(*range(100, 100 + ROWS)),
        torch.zeros(ROWS, 3, dtype=torch.int32, device=DEVICE),
    )


def embeddings(kind: str, dtype: torch.dtype = torch.float32) -> Embeddings:
    torch.manual_seed(0)
    tokens = torch.randn(VOCAB, HIDDEN).to(dtype).to(DEVICE)
    if kind == "learned":
        return Embeddings(tokens, torch.randn(500, HIDDEN).to(dtype).to(DEVICE), None)
    return Embeddings(tokens, None, (10_000.0 ** -torch.linspace(0, 1, HALF_DIM)).to(DEVICE))


def check_inputs(
    given: Embeddings,
    tokens: list[int],
    positions: list[int],
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Embeddings and angles of these tokens are there, and nothing behind them."""
    count = len(tokens)
    want = given.tokens[tokens]
    if given.positions is not None:
        want = (want.float() + given.positions[positions].float()).to(want.dtype)
    assert torch.equal(x[:count], want)
    assert x[count:].isnan().all()
    for got, function in zip(angles, (torch.cos, torch.sin), strict=True):
        if given.frequencies is not None:
            angle = torch.tensor(positions, device=DEVICE)[:, None].float() * given.frequencies
            torch.testing.assert_close(got[:count], function(angle), rtol=1e-5, atol=1e-5)
        assert got[0 if given.frequencies is None else count :].isnan().all()


def results(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    widths = ((HIDDEN, dtype), (HALF_DIM, torch.float32), (HALF_DIM, torch.float32))
    return [torch.full((count, w), math.nan, dtype=d, device=DEVICE) for w, d in widths]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_a_decode_step_begins_with_what_the_rows_say(kind: str, dtype: torch.dtype) -> None:
    state, given = some_rows(), embeddings(kind, dtype)
    order = [7, 2, 9, SCRATCH, SCRATCH]
    plan = DecodePlan(8, 4, 2, 16, 5, DEVICE)
    plan.items.fill_(-7)
    x, cos, sin = results(6, dtype)
    begin_decode(words(*order), state, given, x, cos, sin, plan, LAUNCH, shortest=64)
    positions = state.computed[order].tolist()
    check_inputs(given, state.next_token[order].tolist(), positions, x, (cos, sin))
    # as few items of a sequence as possible, as long as each other, in multiples of 32
    lengths = [position + 1 for position in positions]
    each = -(-max(64, -(-sum(lengths) // 5)) // 64) * 64
    want = []
    for i, (row, length) in enumerate(zip(order, lengths, strict=True)):
        part = -(-length // -(-length // each))
        part = -(-part // 32) * 32
        starts = range(0, length, part)
        for c, start in enumerate(starts):
            stop = min(start + part, length)
            want.append([i, i, row, start, stop, c, len(starts), length - 1])
    assert len(want) > len(order), "some are split"
    assert int(plan.num_items) == len(want)
    assert plan.items[: len(want)].tolist() == want
    assert (plan.items[len(want) :] == -7).all()


def test_the_device_and_the_host_cut_alike() -> None:
    state, given = some_rows(), embeddings("rope")
    state.computed.mul_(7)
    order = [0, 3, 5, 8, 1]
    plan = DecodePlan(5, 4, 2, 16, 6, DEVICE)
    x, cos, sin = results(5)
    begin_decode(words(*order), state, given, x, cos, sin, plan, LAUNCH)
    rows = np.array(order)
    items = cut_items(np.arange(5), rows, np.arange(5), state.computed[order].cpu().numpy(), 6)
    assert len(items) > 5
    assert plan.items[: int(plan.num_items)].tolist() == items.tolist()


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_a_ragged_step_takes_what_the_host_does_not_know_from_the_rows(kind: str) -> None:
    state, given = some_rows(), embeddings(kind)
    ids, rows, positions = [4, 9, -1, 0, -1], [3, 3, 8, 1, 5], [10, 11, 250, 0, 3]
    x, cos, sin = results(7)
    begin_ragged(words(*ids), words(*rows), words(*positions), state, given, x, cos, sin, LAUNCH)
    known = [*ids]
    known[2], known[4] = int(state.next_token[8]), int(state.next_token[5])
    check_inputs(given, known, positions, x, (cos, sin))


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("kind", ["decode", "ragged"])
def test_a_step_begins_with_the_sums_of_its_rows(kind: str, layer: bool) -> None:
    state, given = some_rows(), embeddings("learned", HALF)
    x, cos, sin = results(3, HALF)
    stats = RowStats(4, HIDDEN, layer=layer, device=DEVICE)
    stats.values.fill_(math.nan)
    stats.blocks = min(2, stats.width)
    rows = words(7, 2, 9)
    if kind == "decode":
        plan = DecodePlan(8, 4, 2, 16, 5, DEVICE)
        begin_decode(rows, state, given, x, cos, sin, plan, LAUNCH, stats=stats)
    else:
        ids, positions = words(4, 9, -1), words(10, 11, 25)
        begin_ragged(ids, rows, positions, state, given, x, cos, sin, LAUNCH, stats=stats)
    numbers = x.double()
    sums = stats.values[:, :, : stats.blocks].double().sum(2)
    torch.testing.assert_close(sums[:3, 0], numbers.pow(2).sum(1), rtol=1e-5, atol=1e-5)
    if layer:
        torch.testing.assert_close(sums[:3, 1], numbers.sum(1), rtol=1e-5, atol=1e-5)
    assert stats.values[3].isnan().all()
    assert stats.values[:, :, stats.blocks :].isnan().all()


def columns(state: SequenceRows) -> list[list[int]]:
    return [column.tolist() for column in (state.next_token, state.computed, state.output_index)]


def test_a_decode_step_ends_with_a_token_more_in_every_row_of_the_step() -> None:
    state, upload = some_rows(), words(5, 0, 1, 1)
    want = columns(state)
    order = [7, 2, 9, SCRATCH, SCRATCH]
    tokens = [31, 32, 33, 34, 35]
    for row, token in zip(order[:3], tokens, strict=False):
        want[0][row] = token
        want[1][row] += 1
        want[2][row] += 1
    mailbox = Mailbox(2, 5, DEVICE)
    results = torch.stack([words(*tokens), words(1, 1, 0, 1, 1), words(1, 0, 1, 1, 1)])
    slot = mailbox.open(5)
    apply_updates(words(0, 0), words(0), LAUNCH, mailbox)
    advance(words(*order), results, state, upload, mailbox, LAUNCH)
    synchronize()
    assert slot.tolist() == results.tolist()
    assert columns(state) == want, "and the scratch row stays at position 0"
    assert upload.tolist() == [0, 0, 1, 1]


def test_a_ragged_step_ends_with_tokens_only_for_those_that_sampled() -> None:
    state, upload = some_rows(), words(5, 0)
    want = columns(state)
    order, counts, samples = [4, 6, 0, SCRATCH], [30, 1, 7, 0], [0, 1, 1, 0]
    for row, count in zip(order[:3], counts, strict=False):
        want[1][row] += count
    for row, token in ((6, 22), (0, 23)):
        want[0][row] = token
        want[2][row] += 1
    advance(
        words(*order),
        torch.stack([words(21, 22, 23, 24), words(1, 1, 1, 1), words(1, 1, 1, 1)]),
        state,
        upload,
        Mailbox(2, 4, DEVICE),
        LAUNCH,
        samples=words(*samples),
        counts=words(*counts),
    )
    assert columns(state) == want
    assert int(upload[0]) == 0


@pytest.mark.parametrize("count", [0, 1, 300, 5000])  # a program takes 256 at a time, 16 run
def test_changes_reach_their_places_and_no_others(count: int) -> None:
    rng = np.random.default_rng(count)
    arena = rng.integers(-(2**31), 2**31, 6000).astype(np.int32)
    places = rng.permutation(6000)[: count + 1]  # the last one is beyond the count
    values = rng.integers(-(2**31), 2**31, count + 1).astype(np.int32)
    upload = np.empty(2 + 2 * (count + 1), np.int32)
    upload[:2], upload[2::2], upload[3::2] = (count, 0), places, values
    there = torch.from_numpy(arena).to(DEVICE, copy=True)
    apply_updates(torch.from_numpy(upload).to(DEVICE), there, LAUNCH)
    arena[places[:count]] = values[:count]
    assert there.tolist() == arena.tolist()


def test_every_step_has_a_slot_in_turn_also_after_one_that_failed() -> None:
    mailbox = Mailbox(3, 2, DEVICE)
    state = some_rows()

    def step(token: int, *, fails_after: int = 2) -> torch.Tensor:
        slot = mailbox.open(2)
        mailbox.keep() if fails_after > 1 else mailbox.lose()
        if fails_after > 0:
            apply_updates(words(0, 0), words(0), LAUNCH, mailbox)
        if fails_after > 1:
            results = torch.stack([words(token, token + 1), words(1, 1), words(1, 0)])
            advance(words(1, 2), results, state, words(0, 0), mailbox, LAUNCH)
        return slot

    def read(slot: torch.Tensor) -> Any:
        synchronize()
        return slot[0].tolist()

    slots = [step(token) for token in (10, 20, 30)]
    assert [read(slot) for slot in slots] == [[10, 11], [20, 21], [30, 31]]
    # a change that comes in several pieces is no step
    apply_updates(words(0, 0), words(0), LAUNCH)
    assert read(step(40)) == [40, 41]
    for fails_after in (0, 1):  # before the device took its turn, and behind it
        before = [step(50), step(60)]  # not collected yet
        step(0, fails_after=fails_after)
        after = step(70)
        assert [read(slot) for slot in (*before, after)] == [[50, 51], [60, 61], [70, 71]]
