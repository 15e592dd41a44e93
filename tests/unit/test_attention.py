"""Attention backends against the oracle, and the oracle against plain attention."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pagelab.attention.base import AttentionBackend, Span
from pagelab.attention.cpu import CpuAttention
from pagelab.attention.native import NativeAttention
from pagelab.attention.reference import ReferenceAttention
from pagelab.attention.select import resolve_attention, select_attention
from pagelab.errors import ConfigError
from pagelab.native.library import instruction_sets, native
from pagelab.types import BlockId
from tests.support.paged import DEVICE


def case(
    lengths: list[tuple[int, int]],  # (queries, keys) of each sequence
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[Span]]:
    """Random q, k, v and a cache that holds k and v in scattered blocks among garbage."""
    num_heads, kv_heads = heads
    num_blocks = sum(-(-keys // block_size) for _, keys in lengths) + 3
    free = list(range(num_blocks))
    random.shuffle(free)
    cache = torch.randn(2, kv_heads, num_blocks, block_size, head_dim).to(dtype) * 3
    spans: list[Span] = []
    k_rows, v_rows = [], []
    row = 0
    for queries, keys in lengths:
        table = tuple(BlockId(free.pop()) for _ in range(-(-keys // block_size)))
        spans.append(Span(row, queries, keys, table))
        row += queries
        for position in range(keys - queries, keys):
            block, offset = table[position // block_size], position % block_size
            k_rows.append(cache[0, :, block, offset])
            v_rows.append(cache[1, :, block, offset])
    q = torch.randn(row, num_heads, head_dim).to(dtype)
    return q, torch.stack(k_rows), torch.stack(v_rows), cache, spans


def attend(backend: AttentionBackend, *args: torch.Tensor | list[Span]) -> torch.Tensor:
    q, k, v, cache, spans = args
    plan = backend.plan(spans, cache)  # type: ignore[arg-type]
    return backend.attend(q, k, v, cache, plan, 0.2)  # type: ignore[arg-type]


def test_the_oracle_equals_plain_causal_attention() -> None:
    torch.manual_seed(0)
    q, k, v, cache, spans = case([(13, 13)], 4, (4, 2), 8, torch.float32)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1).repeat_interleave(2, dim=0)[None],
        v.transpose(0, 1).repeat_interleave(2, dim=0)[None],
        is_causal=True,
        scale=0.2,
    )[0].transpose(0, 1)
    torch.testing.assert_close(attend(ReferenceAttention(), q, k, v, cache, spans), expected)


def test_a_chunk_of_the_oracle_equals_the_end_of_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v, cache, spans = case([(13, 13)], 4, (4, 2), 8, torch.float32)
    whole = attend(ReferenceAttention(), q, k, v, cache, spans)
    chunk = [Span(0, 5, 13, spans[0].block_ids)]
    part = attend(ReferenceAttention(), q[8:], k[8:], v[8:], cache, chunk)
    torch.testing.assert_close(part, whole[8:])


BLOCK_SIZES = [1, 8, 16, 64]
HEADS = [(4, 4), (9, 3), (8, 1)]
LENGTHS = [
    [(1, 1)],
    [(1, n) for n in (1, 2, 17, 33, 150, 151, 300, 310)],
    [(7, 7), (1, 20), (5, 70), (1, 21), (64, 64), (1, 300)],
    [(2, 2)],
    [(16, 160), (1, 16)],
]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_cpu_equals_the_oracle(
    block_size: int, heads: tuple[int, int], lengths: list[tuple[int, int]]
) -> None:
    check("cpu", block_size, heads, lengths)


@pytest.mark.parametrize("isa", instruction_sets() or ["none"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("heads", [*HEADS, (10, 2)])
@pytest.mark.parametrize("lengths", [*LENGTHS, [(1, 700), (130, 300)]])
def test_the_extension_equals_the_oracle(
    block_size: int,
    heads: tuple[int, int],
    lengths: list[tuple[int, int]],
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isa == "none":
        pytest.skip("the extension is not compiled here")
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    check("native", block_size, heads, lengths)


@pytest.mark.parametrize(
    ("block_size", "heads", "lengths"),
    [(BLOCK_SIZES[i % 4], HEADS[i % 3], lengths) for i, lengths in enumerate(LENGTHS)],
)
def test_triton_equals_the_oracle(
    block_size: int, heads: tuple[int, int], lengths: list[tuple[int, int]]
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    check("triton", block_size, heads, lengths)


def check(
    backend: str, block_size: int, heads: tuple[int, int], lengths: list[tuple[int, int]]
) -> None:
    torch.manual_seed(len(lengths))
    random.seed(block_size)
    inputs = case(lengths, block_size, heads, 16, torch.float32)
    there = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
    got = attend(select_attention(backend), *(there if backend == "triton" else inputs)).cpu()
    torch.testing.assert_close(got, attend(ReferenceAttention(), *inputs), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_cpu_in_lower_precision_stays_near_the_oracle(dtype: torch.dtype, tolerance: float) -> None:
    lower_precision(CpuAttention(), dtype, tolerance)


def test_the_extension_in_bfloat16_stays_near_the_oracle() -> None:
    if native() is None:
        pytest.skip("the extension does not run here")
    lower_precision(NativeAttention(), torch.bfloat16, 2e-2)


def lower_precision(backend: AttentionBackend, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    inputs = case([(1, 70), (9, 9), (3, 40)], 16, (4, 2), 32, dtype)
    got = attend(backend, *inputs).float()
    want = attend(ReferenceAttention(), *inputs).float()
    assert float((got - want).norm() / want.norm()) < tolerance


def test_long_contexts_are_split_into_groups_that_fit_the_caches() -> None:
    spans = [Span(i, 1, 1000, tuple(BlockId(b) for b in range(63))) for i in range(10)]
    plan = CpuAttention().plan(spans, torch.empty(2, 1, 63, 16, 1))
    assert [len(group.rows) for group in plan.groups] == [4, 4, 2]


def test_backends_are_selected_by_name() -> None:
    assert select_attention("cpu").name == "cpu"
    assert select_attention("reference").name == "reference"
    with pytest.raises(ConfigError, match="choose auto or one of cpu, native, reference, triton"):
        select_attention("flash")


def test_a_cpu_computes_with_the_cpus_backend_unless_told() -> None:
    here = torch.device("cpu")
    assert resolve_attention("auto", here) == "cpu", "also where Triton's interpreter is on"
    assert resolve_attention("reference", here) == "reference"
    with pytest.raises(ConfigError, match="choose auto or one of cpu, native, reference, triton"):
        resolve_attention("flash", here)


def test_triton_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        resolve_attention("triton", torch.device("cpu"))
    assert resolve_attention("auto", torch.device("cuda")) == "cpu"
