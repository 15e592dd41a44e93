"""Attention of single tokens by the Triton kernel, against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.decode_items import DecodePlan
from pagelab.kernels.launch import device_of
from pagelab.kernels.paged_decode import Projections, decode_attention
from pagelab.kernels.sizes import DESCRIPTOR
from tests.support.paged import DEVICE, HALF, TOLERANCE, Paged, attend, scattered, turned

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch: sequences by their keys, and into items of how many keys they are cut."""

    keys: tuple[int, ...] = (1, 17, 40)
    item: int = 1 << 20
    dim: int = 64
    kv_heads: int = 2
    group: int = 1
    block: int = 16
    window: int = 0
    softcap: float = 0.0
    norm: bool = False
    rope: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shown = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return " ".join(shown).replace(str(HALF), "half") or "default"


def items_of(case: Case, paged: Paged, q_rows: Sequence[int]) -> torch.Tensor:
    """Equal pieces of each sequence."""
    items = []
    for i, keys in enumerate(case.keys):
        count = -(-keys // case.item)
        for c in range(count):
            bounds = (c * case.item, min(keys, (c + 1) * case.item))
            items.append([i, q_rows[i], paged.rows[i], *bounds, c, count, keys - 1])
    return torch.tensor(items, dtype=torch.int32)


def launch(
    case: Case, paged: Paged, x: torch.Tensor, q_rows: list[int], projections: Projections | None
) -> torch.Tensor:
    """The output of a launch, NaN where it wrote nothing."""
    heads, seqs = case.group * case.kv_heads, len(case.keys)
    items = items_of(case, paged, q_rows)
    plan = DecodePlan(seqs, heads, case.kv_heads, case.dim, len(items) + 1, DEVICE)
    plan.items.fill_(1 << 20)  # beyond `num_items`
    plan.items[: len(items)] = items.to(DEVICE)
    plan.num_items.fill_(len(items))
    plan.partial.fill_(math.nan)
    plan.partial_ml.fill_(math.nan)
    assert plan.items.shape[1] == items.shape[1] == DESCRIPTOR
    out = torch.full((len(x), heads, case.dim), math.nan, dtype=case.dtype, device=DEVICE)
    decode_attention(
        x.to(DEVICE),
        out,
        paged.cache,
        paged.tables,
        plan,
        0.2,
        device_of(DEVICE),
        num_seqs=seqs,
        projections=projections,
        window=case.window,
        softcap=case.softcap,
    )
    assert not plan.arrived.any(), "the next layer would count on"
    return out.cpu()


def check(case: Case, q: torch.Tensor, paged: Paged, out: torch.Tensor, rows: list[int]) -> None:
    """Every sequence's row is right, and no other was touched."""
    for i, row in enumerate(rows):
        want = attend(
            q[row : row + 1],
            paged.keys[i],
            paged.values[i],
            case.keys[i] - 1,
            0.2,
            window=case.window,
            softcap=case.softcap,
        )
        tolerance = TOLERANCE[case.dtype]
        torch.testing.assert_close(out[row].double(), want[0], rtol=tolerance, atol=tolerance)
    others = [row for row in range(len(out)) if row not in rows]
    assert others
    assert out[others].isnan().all()


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(group=3, block=8, item=16),
        Case(dim=80, group=4, block=32, kv_heads=1, item=32),
        Case(dim=128, group=8, kv_heads=1, block=256),
        Case(dim=256, group=3, kv_heads=1, block=64, item=32),
        Case(window=9, item=16),
        Case(window=16, softcap=2.0, block=8),
        Case(keys=(130,), softcap=5.0, group=4, kv_heads=1, item=7),
        Case(dtype=HALF, group=3, item=16),
        Case(dtype=HALF, dim=80, kv_heads=1, block=8),
    ],
    ids=str,
)
def test_every_sequence_attends_to_its_own_keys(case: Case) -> None:
    torch.manual_seed(0)
    paged = scattered(
        case.keys,
        kv_heads=case.kv_heads,
        dim=case.dim,
        block_size=case.block,
        dtype=case.dtype,
    )
    before = paged.cache.clone()
    rows = [len(case.keys) - i for i in range(len(case.keys))]  # row 0 is of nobody
    q = torch.randn(len(rows) + 1, case.group * case.kv_heads, case.dim).to(case.dtype)
    out = launch(case, paged, q, rows, None)
    check(case, q, paged, out, rows)
    torch.testing.assert_close(paged.cache, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(rope=True, norm=True, group=3, item=16, block=8),
        Case(rope=True, dim=80, group=4, kv_heads=1, block=256),
        Case(norm=True, dim=128, group=8, kv_heads=1, item=32),
        Case(rope=True, norm=True, dim=256, group=4, kv_heads=1, block=64),
        Case(rope=True, window=9, softcap=3.0, item=16),
        Case(keys=(33, 1), window=1, item=16),
        Case(keys=(17, 65), item=16),  # the last item holds nothing but the token itself
        Case(rope=True, norm=True, group=3, item=16, dtype=HALF),
        Case(dim=128, kv_heads=1, dtype=HALF),
    ],
    ids=str,
)
def test_fused_it_turns_projections_and_writes_its_own_key(case: Case) -> None:
    torch.manual_seed(1)
    kv_heads, dim = case.kv_heads, case.dim
    heads, seqs = case.group * kv_heads, len(case.keys)
    paged = scattered(
        case.keys,
        kv_heads=kv_heads,
        dim=dim,
        block_size=case.block,
        dtype=case.dtype,
        written=[keys - 1 for keys in case.keys],
    )
    expected = paged.cache.cpu().clone()
    rows = list(range(1, seqs + 1))  # row 0 is of nobody
    raw = torch.randn(seqs + 1, heads + 2 * kv_heads, dim).to(case.dtype)
    angles = torch.randn(seqs + 1, dim // 2) * 3
    cos, sin = (angles.cos(), angles.sin()) if case.rope else (None, None)
    weights = [1 + torch.randn(dim).to(case.dtype) / 4 if case.norm else None for _ in range(2)]
    q_raw, k_raw, v = raw.split([heads, kv_heads, kv_heads], 1)
    q = turned(q_raw, weights[0], cos, sin, EPS).to(case.dtype)
    k = turned(k_raw, weights[1], cos, sin, EPS).to(case.dtype)
    for i, row in enumerate(rows):
        last = case.keys[i] - 1
        block, offset = paged.slot(i, last)
        for which, new in ((0, k[row]), (1, v[row])):
            expected[which, :, block, offset] = new
        paged.keys[i][:, last], paged.values[i][:, last] = k[row], v[row]
    there = [None if x is None else x.to(DEVICE) for x in (cos, sin, *weights)]
    projections = Projections(there[0], there[1], there[2], there[3], EPS)
    out = launch(case, paged, raw.flatten(1), rows, projections)
    check(case, q, paged, out, rows)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(
        paged.cache.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def test_how_a_sequence_is_cut_hardly_changes_its_result() -> None:
    case = Case(keys=(150, 1), kv_heads=1, group=3)
    torch.manual_seed(2)
    paged = scattered(case.keys, kv_heads=1, dim=64, block_size=16)
    q = torch.randn(3, 3, 64)
    whole = launch(case, paged, q, [0, 1], None)
    for item in (149, 37, 16):
        cut = launch(Case(keys=case.keys, kv_heads=1, group=3, item=item), paged, q, [0, 1], None)
        torch.testing.assert_close(cut[:2], whole[:2], rtol=1e-5, atol=1e-5)


def test_a_sequence_does_not_depend_on_the_ones_beside_it() -> None:
    torch.manual_seed(3)
    case = Case(keys=(40, 23, 90), item=32, group=3)
    paged = scattered(case.keys, kv_heads=2, dim=64, block_size=16)
    q = torch.randn(4, 6, 64)
    together = launch(case, paged, q, [2, 0, 1], None)
    one = Paged(paged.cache, paged.tables, paged.rows[2:], paged.keys[2:], paged.values[2:])
    alone = launch(Case(keys=(90,), item=32, group=3), one, q, [1], None)
    assert torch.equal(alone[1], together[1])
