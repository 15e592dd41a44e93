"""Linear layers by the Triton kernel, in every way that they are cut, against torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.launch import device_of
from pagelab.kernels.linear import (
    FoldedNorm,
    Peaks,
    SplitWorkspace,
    Tiling,
    _whole_tiles,
    empty_rows,
    linear,
    within,
)
from pagelab.kernels.mailbox import Mailbox
from pagelab.kernels.row_stats import RowStats
from pagelab.kernels.sizes import MAX_LINEAR_ROWS
from pagelab.kernels.step_state import SequenceRows, pick_and_advance
from pagelab.kernels.tilings import head_tiling, tiling_for
from pagelab.kernels.updates import apply_updates
from tests.support.paged import DEVICE, HALF, TOLERANCE, synchronize

EPS = 1e-5
PLAIN = Tiling(16, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product `[rows, k] · [n, k]ᵀ` and what goes along."""

    rows: int = 5
    n: int = 40
    k: int = 64
    tiling: Tiling = PLAIN
    bias: bool = False
    norm: str = ""
    activation: str = "none"
    gated: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shown = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        text = " ".join(shown).replace(str(HALF), "half") or "default"
        return text.replace("tiling=Tiling", "")


CASES = [
    Case(),
    Case(tiling=Tiling(16, 16, 32, prefetch=64), rows=2),  # asked for on a GPU only
    Case(rows=17, bias=True),  # more than block_m: two blocks of rows
    Case(rows=1, k=80, bias=True, residual=True),  # a part that its tiles do not divide
    Case(tiling=Tiling(16, 64, 16), n=130, activation="gelu", bias=True),
    Case(activation="gelu_tanh", bias=True, norm="layer"),
    Case(gated=True, activation="silu", n=56),
    Case(gated=True, activation="silu", norm="rms", bias=True, k=80),
    Case(gated=True, activation="gelu_tanh", norm="layer", rows=17),
    Case(norm="rms"),
    Case(norm="layer", tiling=Tiling(32, 32, 64), rows=33),
    Case(residual=True, tiling=Tiling(16, 32, 16, split=2)),
    Case(residual=True, bias=True, tiling=Tiling(16, 16, 16, split=4), rows=17),
    Case(activation="gelu", tiling=Tiling(16, 32, 16, split=2)),
    Case(tiling=Tiling(16, 16, 32, resident=True), bias=True, residual=True),
    Case(tiling=Tiling(16, 16, 32, resident=True), gated=True, activation="silu", norm="rms"),
    Case(tiling=Tiling(16, 16, 32, resident=True), norm="layer", rows=17),
    Case(dtype=HALF, bias=True, residual=True, tiling=Tiling(16, 32, 16, split=2)),
    Case(tiling=Tiling(32, 16, 32, descriptors=True), rows=33, residual=True),
    Case(tiling=Tiling(16, 16, 32, descriptors=True), gated=True, activation="silu", norm="rms"),
    Case(tiling=Tiling(16, 16, 16, split=2, descriptors=True), n=56, bias=True, residual=True),
    Case(dtype=HALF, norm="rms", gated=True, activation="silu"),
    Case(dtype=HALF, norm="layer", bias=True, activation="gelu_tanh"),
]


def expected(
    case: Case,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    y = x.double()
    if case.norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if case.norm:
        y = y * (y.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    y = F.linear(y, weight.double(), None if bias is None else bias.double())
    gate, up = (y[:, ::2], y[:, 1::2]) if case.gated else (y, torch.ones(()).double())
    if case.activation == "silu":
        gate = F.silu(gate)
    elif case.activation != "none":
        gate = F.gelu(gate, approximate="tanh" if case.activation == "gelu_tanh" else "none")
    return gate * up + (0 if residual is None else residual.double())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_product_equals_torchs_and_nothing_else_is_written(case: Case) -> None:
    torch.manual_seed(0)
    outputs = case.n * (2 if case.gated else 1)
    x = torch.randn(case.rows, case.k).to(case.dtype) + (1 if case.norm else 0)
    weight = (torch.randn(outputs, case.k) / case.k**0.5).to(case.dtype)
    bias = torch.randn(outputs).to(case.dtype) if case.bias else None
    room = torch.full((case.rows + 1, case.n), math.nan, dtype=case.dtype)
    residual = None
    if case.residual:
        residual = torch.randn(case.rows, case.n).to(case.dtype)
        room[: case.rows] = residual  # in place, as the residual stream is
    there = room.to(DEVICE)
    out = there[: case.rows]
    norm = None
    if case.norm:
        sums = weight.float().sum(1).to(DEVICE) if case.norm == "layer" else None
        norm = FoldedNorm(EPS, sums)
    workspace = SplitWorkspace(4 * case.rows * outputs, 64, DEVICE)
    workspace.partial.fill_(math.nan)
    stats = None
    if case.norm:
        stats = stats_of(x, layer=case.norm == "layer")
    elif case.residual:  # as the stream's next reader needs them
        stats = RowStats(case.rows, case.n, layer=case.bias, device=DEVICE)
        stats.values.fill_(math.nan)
    linear(
        x.to(DEVICE),
        weight.to(DEVICE),
        out,
        case.tiling,
        workspace,
        device_of(DEVICE),
        bias=None if bias is None else bias.to(DEVICE),
        norm=norm,
        activation=case.activation,
        gated=case.gated,
        residual=out if case.residual else None,
        stats=stats,
    )
    want = expected(case, x, weight, bias, residual)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)
    assert there[case.rows :].isnan().all()
    assert not workspace.arrived.any(), "the next split product would count on"
    if stats is not None and case.residual:
        written = stats.values[:, :, : stats.blocks].double().sum(2).cpu()
        numbers = out.cpu().double()  # as they were rounded
        torch.testing.assert_close(written[:, 0], numbers.pow(2).sum(1), rtol=1e-5, atol=1e-5)
        if stats.layer:
            torch.testing.assert_close(written[:, 1], numbers.sum(1), rtol=1e-5, atol=1e-5)
        assert stats.values[:, :, stats.blocks :].isnan().all()


def stats_of(x: torch.Tensor, *, layer: bool) -> RowStats:
    """The sums of x's rows in three blocks, with NaN wherever nobody may look."""
    stats = RowStats(len(x), x.shape[1], layer=layer, device=DEVICE)
    stats.values.fill_(math.nan)
    stats.blocks = 3
    for i, part in enumerate(x.double().tensor_split(3, 1)):
        stats.values[:, 0, i] = part.pow(2).sum(1).to(DEVICE)
        if layer:
            stats.values[:, 1, i] = part.sum(1).to(DEVICE)
    return stats


def test_tiles_end_where_memory_does() -> None:
    like = torch.empty(1, 64, dtype=HALF)
    assert empty_rows(like, 33, 64).shape == (33, 64)
    x = empty_rows(like, 130, 64)
    assert x.shape == (130, 64)
    assert _whole_tiles(x, 128, 32).shape == [256, 64]
    exact = torch.empty(130, 64, dtype=HALF)
    assert _whole_tiles(exact, 128, 32).shape == [130, 64]
    assert _whole_tiles(exact[100:], 16, 32).shape == [30, 64]


@pytest.mark.parametrize("tiling", [PLAIN, Tiling(16, 16, 16, split=2)])
def test_a_row_does_not_depend_on_the_rows_beside_it(tiling: Tiling) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(16, 64).to(DEVICE), torch.randn(40, 64).to(DEVICE)
    workspace = SplitWorkspace(2 * 16 * 40, 8, DEVICE)
    together, alone = torch.empty(16, 40).to(DEVICE), torch.empty(1, 40).to(DEVICE)
    linear(x, weight, together, tiling, workspace, device_of(DEVICE))
    linear(x[11:12], weight, alone, tiling, workspace, device_of(DEVICE))
    assert torch.equal(together[11:12], alone)


@pytest.mark.parametrize("tiling", [Tiling(16, 32, 32), Tiling(16, 32, 32, split=2)])
def test_greedy_choices_come_from_the_peaks_of_blocks(tiling: Tiling) -> None:
    torch.manual_seed(2)
    vocab, rows, scratch = 150, 5, 7
    x, weight = torch.randn(rows, 64), torch.randn(vocab, 64).round()
    x[0], x[4] = weight[40], weight[149]  # of the second block, and of the last one
    x[1] = 0.0  # all are equal: the first one wins
    x[2, 3] = math.nan
    x[3, 5], weight[:, 5] = math.inf, 1.0  # all are infinite
    peaks = Peaks(rows, vocab, DEVICE)
    peaks.values.fill_(math.nan)
    shape = torch.empty(1, device=DEVICE).expand(rows, vocab)
    workspace = SplitWorkspace(2 * rows * vocab, 8, DEVICE)
    launch = device_of(DEVICE)
    linear(x.to(DEVICE), weight.to(DEVICE), shape, tiling, workspace, launch, peaks=peaks)
    columns = [torch.arange(8, dtype=torch.int32, device=DEVICE) + 10 * i for i in range(3)]
    tables = torch.zeros(8, 1, dtype=torch.int32, device=DEVICE)
    state = SequenceRows(columns[0], columns[1], columns[2], tables)
    want = [column.tolist() for column in columns]
    order = [6, 0, 2, 5, scratch]
    results = torch.full((3, 6), -1, dtype=torch.int32, device=DEVICE)
    results[2] = torch.tensor([1, 1, 0, 1, 1, -1], device=DEVICE)
    upload = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    where = torch.tensor(order, dtype=torch.int32, device=DEVICE)
    mailbox = Mailbox(2, 6, DEVICE)
    slot = mailbox.open(rows)
    apply_updates(torch.zeros_like(upload), upload, launch, mailbox)
    pick_and_advance(peaks, 5, where, state, results[:, :rows], upload, mailbox, launch)
    synchronize()
    logits = x.double() @ weight.double().t()
    best = [int((row == row.max()).nonzero()[0]) for row in logits[[0, 1, 4]]]
    assert best[1] == 0
    assert results[0].tolist() == [best[0], 0, 0, 0, best[2], -1]
    assert results[1].tolist() == [1, 1, 0, 0, 1, -1]
    assert slot.tolist() == results[:, :rows].tolist()
    assert int(upload[0]) == 0
    for row, token in zip(order[:4], results[0].tolist(), strict=False):
        want[0][row], want[1][row], want[2][row] = token, want[1][row] + 1, want[2][row] + 1
    assert [column.tolist() for column in columns] == want, "and the scratch row stays as it is"


@settings(deadline=None)
@given(
    rows=st.integers(1, 100),
    n=st.integers(1, 5000).map(lambda i: 8 * i),
    k=st.integers(1, 1500).map(lambda i: 8 * i),
    gated=st.booleans(),
    norm=st.booleans(),
)
def test_a_tiling_divides_what_it_cuts(rows: int, n: int, k: int, gated: bool, norm: bool) -> None:
    for tiling in (tiling_for(rows, n, k, gated=gated, norm=norm), head_tiling(rows, k)):
        if rows > MAX_LINEAR_ROWS:
            assert tiling is None
        if tiling is None:
            continue
        part, rest = divmod(k, tiling.split)
        assert rest == 0
        assert part % tiling.block_k == 0
        assert tiling.block_k >= 16, "a matrix unit takes no less"
        assert tiling.block_m & (tiling.block_m - 1) == 0
        assert tiling.prefetch <= part
        # pieces of rows, as `_prefetch` asks for them: multiples of 16 bytes
        assert tiling.prefetch * tiling.block_n * 2 % (128 * 16) == 0
    whole = tiling_for(rows, n, k, gated=gated, norm=norm)
    assert whole is None or whole.split == 1 or not (gated or norm)


def test_a_tiling_keeps_to_the_shared_memory_of_the_card() -> None:
    wide = Tiling(64, 128, 128, stages=4, warps=8)
    assert within(wide, 1024, 2, shared_bytes=232_448) == wide
    assert within(wide, 1024, 2, shared_bytes=101_376).stages == 2
    held = Tiling(16, 32, 256, warps=8, resident=True)
    assert within(held, 1024, 2, shared_bytes=101_376) == held
    assert not within(held, 4096, 2, shared_bytes=101_376).resident
