"""On an NVIDIA GPU: a product gives the same bits every time, whatever runs before it.

A tile that is read before it has arrived, or overwritten before it was read, shows here and
nowhere else: the wrong sum is close to the right one.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.kernels.launch import device_of
from pagelab.kernels.linear import FoldedNorm, SplitWorkspace, Tiling, linear
from pagelab.kernels.row_stats import RowStats
from pagelab.kernels.tilings import INVARIANT, tiling_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CUDA = torch.device("cuda")
RUNS = 60
# (outputs, k, gated, norm) of a layer's four products
PRODUCTS = {
    "gpt2": [
        (2304, 768, False, 2),
        (768, 768, False, 0),
        (3072, 768, False, 2),
        (768, 3072, False, 0),
    ],
    "qwen3-0.6b": [
        (4096, 1024, False, 1),
        (1024, 2048, False, 0),
        (3072, 1024, True, 1),
        (1024, 3072, False, 0),
    ],
    "llama-3.1-8b": [(4096, 4096, False, 0), (14336, 4096, True, 1), (4096, 14336, False, 0)],
}
ROWS = [1, 4, 16, 24, 64, 96, 192, 256]


@cache
def workspace() -> SplitWorkspace:
    return SplitWorkspace(4 * 256 * 14336, 1 << 16, CUDA)


def check(rows: int, n: int, k: int, tiling: Tiling, *, gated: bool, norm: int) -> None:
    torch.manual_seed(rows + n + k)
    bf16 = torch.bfloat16
    x = torch.randn(rows, k, device=CUDA, dtype=bf16)
    weight = torch.randn(n * (2 if gated else 1), k, device=CUDA, dtype=bf16) / k**0.5
    sums = weight.float().sum(1) if norm == 2 else None
    folded = FoldedNorm(1e-5, sums) if norm else None
    stats = RowStats(rows, k, layer=norm == 2, device=CUDA) if norm else None
    if stats is not None:
        stats.values[:, 0, 0] = x.float().pow(2).sum(1)
        stats.values[:, 1, 0] = x.float().sum(1)
    before = torch.randn(1 << 22, device=CUDA)
    expected = x.float()
    if norm == 2:
        expected = torch.nn.functional.layer_norm(expected, [k], eps=1e-5)
    elif norm == 1:
        expected = torch.nn.functional.rms_norm(expected, [k], eps=1e-5)
    expected = expected @ weight.float().t()
    if gated:
        expected = torch.nn.functional.silu(expected[:, ::2]) * expected[:, 1::2]
    first: torch.Tensor | None = None
    for i in range(RUNS):
        out = torch.full((rows, n), float("nan"), device=CUDA, dtype=bf16)
        before.mul_(1.0)[: 1 << (10 + i % 12)].add_(0.0)  # so that it starts in different company
        linear(
            x,
            weight,
            out,
            tiling,
            workspace(),
            device_of(CUDA),
            norm=folded,
            activation="silu" if gated else "none",
            gated=gated,
            stats=stats,
        )
        if first is None:
            first = out
            torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=3e-2)
        assert torch.equal(out, first), f"run {i} of {tiling}"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", PRODUCTS)
def test_products_of_a_layer_repeat_to_the_bit(model: str, rows: int) -> None:
    for n, k, gated, norm in PRODUCTS[model]:
        tiling = tiling_for(rows, n, k, gated=gated, norm=norm > 0)
        if tiling is not None:
            check(rows, n, k, tiling, gated=gated, norm=norm)


@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("model", PRODUCTS)
def test_invariant_products_repeat_to_the_bit(model: str, rows: int) -> None:
    for n, k, gated, norm in PRODUCTS[model]:
        check(rows, n, k, INVARIANT, gated=gated, norm=norm)
