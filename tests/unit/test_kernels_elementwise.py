"""Norms, activations and projections by the Triton kernels, against torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.elementwise import (
    NormWeights,
    Pending,
    activate_,
    add_norm,
    gated,
    last_norm,
    project,
    sum_rows,
)
from pagelab.kernels.launch import device_of
from pagelab.kernels.paged_decode import Projections
from pagelab.kernels.row_stats import RowStats
from tests.support.paged import DEVICE, HALF, TOLERANCE, turned

DTYPES = (torch.float32, HALF)
LAUNCH = device_of(DEVICE)
EPS = 1e-5


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.cpu().double(), want.double(), rtol=tolerance, atol=tolerance)


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE, copy=True) for tensor in tensors]


def guarded(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A result to be written, NaN now, and the NaN that lies right behind it."""
    room = torch.full((rows + 1, width), math.nan, dtype=dtype, device=DEVICE)
    return room[:rows], room[rows:]


def norm(x: torch.Tensor, layer: bool) -> torch.Tensor:
    x = x.double()
    if layer:
        x = x - x.mean(-1, keepdim=True)
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_add_norm_adds_then_norms(added: bool, layer: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 96).to(dtype) + 1
    bias = torch.randn(96).to(dtype)
    # the stream is kept in the model's dtype, and normed from there
    want = (x.float() + bias.float()).to(dtype) if added else x
    (got,) = on_device(x)
    h, behind = guarded(3, 96, dtype)
    pending = Pending(bias.to(DEVICE)) if added else Pending()
    add_norm(got, pending, h, LAUNCH, eps=EPS, layer=layer)
    near(got, want)
    near(h, norm(want, layer))
    assert behind.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_rows_are_summed_up_as_they_are_kept(added: bool, layer: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, bias = torch.randn(3, 96).to(dtype) + 1, torch.randn(96).to(dtype)
    want = (x.float() + bias.float()).to(dtype) if added else x
    (got,) = on_device(x)
    stats = RowStats(4, 96, layer=layer, device=DEVICE)
    stats.values.fill_(math.nan)
    sum_rows(got, Pending(bias.to(DEVICE)) if added else Pending(), stats, LAUNCH)
    near(got, want)
    kept = got.cpu().double()
    sums = stats.values.cpu().double()
    assert stats.blocks == 1
    torch.testing.assert_close(sums[:3, 0, 0], kept.pow(2).sum(1), rtol=1e-5, atol=1e-5)
    if layer:
        torch.testing.assert_close(sums[:3, 1, 0], kept.sum(1), rtol=1e-5, atol=1e-5)
    assert sums[3].isnan().all()
    assert sums[:, :, 1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [False, True])
def test_last_norm_takes_the_sampled_rows(layer: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 80).to(dtype)
    weight, bias, add_bias = (torch.randn(80).to(dtype) for _ in range(3))
    rows = [4, 0, 4]
    last = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    h, behind = guarded(3, 80, dtype)
    finite = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    before, there = x.clone(), on_device(x, weight, bias, add_bias)
    last_norm(
        there[0],
        Pending(there[3]),
        last,
        NormWeights(there[1], there[2] if layer else None, EPS, layer),
        h,
        finite[:3],
        LAUNCH,
    )
    want = norm((x.float() + add_bias.float())[rows], layer) * weight.double()
    near(h, want + bias.double() if layer else want)
    assert finite.tolist() == [1, 1, 1, -1]
    assert behind.isnan().all()
    assert torch.equal(there[0].cpu(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_flagged_and_it_alone(value: float) -> None:
    x = torch.zeros(4, 33)
    x[2, 32] = value
    finite = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    last = torch.arange(4, dtype=torch.int32, device=DEVICE)
    there = on_device(x, torch.ones(33))
    h, _ = guarded(4, 33, torch.float32)
    weights = NormWeights(there[1], None, EPS, False)
    last_norm(there[0], None, last, weights, h, finite, LAUNCH)
    assert finite.tolist() == [1, 1, 0, 1]


def activation(kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_activations_equal_torchs(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 2 * 1100).to(dtype) * 4  # more than a program's 1024
    x[0, :6] = torch.tensor([-100.0, -20, 0, 20, 100, 1])
    gate, up = x.double()[:, ::2], x.double()[:, 1::2]
    out, behind = guarded(2, 1100, dtype)
    gated(x.to(DEVICE), out, kind, LAUNCH)
    near(out, activation(kind, gate) * up)
    assert behind.isnan().all()
    (own,) = on_device(x)
    activate_(own, kind, LAUNCH)
    near(own, activation(kind, x.double()))


@dataclass(frozen=True)
class Heads:
    """The geometry of a projection."""

    kv_heads: int
    group: int
    dim: int
    block: int
    norm: bool
    rope: bool
    dtype: torch.dtype = torch.float32


@pytest.mark.parametrize(
    "case",
    [
        Heads(2, 1, 64, 16, norm=False, rope=False),
        Heads(1, 3, 64, 8, norm=True, rope=True),
        Heads(2, 4, 80, 256, norm=False, rope=True),
        Heads(1, 8, 128, 64, norm=True, rope=False),
        Heads(1, 4, 256, 32, norm=True, rope=True, dtype=HALF),
    ],
)
def test_project_gives_q_and_fills_the_slots_of_the_tokens(case: Heads) -> None:
    torch.manual_seed(3)
    kv_heads, dim, size = case.kv_heads, case.dim, case.block
    heads, num_blocks = kv_heads * case.group, 7
    places = [(1, 0), (1, 1), (0, 3 * size - 1), (2, size), (2, size), (0, 5)]
    scratch = {3, 4}  # rows of padding write to the same slot
    tables = torch.tensor([[5, 0, 3], [6, 9, 9], [1, 2, 9]], dtype=torch.int32)
    shape = (2, kv_heads, num_blocks, size, dim)
    cache = torch.full(shape, math.nan, dtype=case.dtype, device=DEVICE)
    raw = torch.randn(len(places), heads + 2 * kv_heads, dim).to(case.dtype)
    angles = torch.randn(len(places), dim // 2) * 3
    cos, sin = (angles.cos(), angles.sin()) if case.rope else (None, None)
    weights = [1 + torch.randn(dim).to(case.dtype) / 4 if case.norm else None for _ in range(2)]
    there = [None if t is None else t.to(DEVICE) for t in (cos, sin, *weights)]
    q, behind = guarded(len(places), heads * dim, case.dtype)
    project(
        raw.flatten(1).to(DEVICE),
        q.view(-1, heads, dim),
        cache,
        tables.to(DEVICE),
        torch.tensor([row for row, _ in places], dtype=torch.int32, device=DEVICE),
        torch.tensor([position for _, position in places], dtype=torch.int32, device=DEVICE),
        Projections(there[0], there[1], there[2], there[3], EPS),
        LAUNCH,
    )
    q_raw, k_raw, v = raw.split([heads, kv_heads, kv_heads], 1)
    near(q.view(-1, heads, dim), turned(q_raw, weights[0], cos, sin, EPS))
    assert behind.isnan().all()
    k = turned(k_raw, weights[1], cos, sin, EPS)
    written = cache.cpu()
    for token, (row, position) in enumerate(places):
        block, offset = int(tables[row, position // size]), position % size
        if token not in scratch:
            near(written[0, :, block, offset], k[token])
            assert torch.equal(written[1, :, block, offset], v[token])
        written[:, :, block, offset] = math.nan
    assert written.isnan().all(), "a slot of nobody was written"
