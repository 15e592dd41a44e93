"""Sampling on the device: against torch, the CPU sampler's filters and a second Philox.

Without a GPU these run in Triton's interpreter (`TRITON_INTERPRET=1`, see tests/conftest.py),
where a program takes about 10 ms: so few rows, small vocabularies, small tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from pagelab.execution.sampler import filtered_probabilities
from pagelab.kernels.launch import device_of
from pagelab.kernels.sampling import (
    SamplingMode,
    SamplingState,
    SamplingWorkspace,
    sample_tokens,
)
from pagelab.types import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 203  # no multiple of a tile
GREEDY = SamplingParams(temperature=0.0)
INF, NAN = math.inf, math.nan


class Row(NamedTuple):
    """What one row is sampled with."""

    params: SamplingParams = GREEDY
    seed: int = 0
    output_index: int = 0
    suppressed: tuple[int, ...] = ()
    min_until: int = 0


class Sampled(NamedTuple):
    """What came out, on the CPU."""

    tokens: list[int]
    usable: list[int]
    lowest: torch.Tensor


def run(
    logits: torch.Tensor,
    rows: Sequence[Row],
    *,
    mode: SamplingMode | None = None,
    positions: Sequence[int] | None = None,
    tile: int = 128,
    candidates: int = 256,
    chunk: int = 256,
) -> Sampled:
    """Sample `rows`, whose parameters lie at `positions` of the state."""
    count, vocab = logits.shape
    positions = list(range(count)) if positions is None else positions
    state = SamplingState.allocate(max(positions) + 1, DEVICE)
    for position, row in zip(positions, rows, strict=True):
        state.temperature[position] = row.params.temperature
        state.top_k[position] = row.params.top_k
        state.top_p[position] = row.params.top_p
        state.min_p[position] = row.params.min_p
        state.seed[position] = row.seed
        state.output_index[position] = row.output_index
        for i, token in enumerate(row.suppressed):
            state.suppressed[position, i] = token
        state.num_suppressed[position] = len(row.suppressed)
        state.min_until[position] = row.min_until
    workspace = SamplingWorkspace(
        count, vocab, DEVICE, tile=tile, candidates=candidates, chunk=chunk
    )
    workspace.lowest.fill_(NAN)
    if mode is None:
        mode = SamplingMode.of([row.params for row in rows], vocab)
    tokens = torch.full((count,), -1, dtype=torch.int32, device=DEVICE)
    usable = torch.full((count,), -1, dtype=torch.int32, device=DEVICE)
    where = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    sample_tokens(logits, where, state, tokens, usable, workspace, mode, device_of(DEVICE))
    return Sampled(tokens.tolist(), usable.tolist(), workspace.lowest.cpu())


def philox(
    counter: Sequence[npt.NDArray[np.uint64] | int], key: tuple[int, int]
) -> list[npt.NDArray[np.uint64]]:
    """Philox4x32-10 as in the paper (Salmon et al., "Parallel random numbers", SC 2011)."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        product0, product2 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product2 >> shift) ^ c1 ^ np.uint64(k0),
            product2 & mask,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def gumbels(seed: int, indices: Sequence[int], vocab: int) -> torch.Tensor:
    """The noise `[indices, vocab]` that the kernels must add, in float64."""
    group = np.arange((vocab + 3) // 4, dtype=np.uint64)[None, :]
    index = np.array(indices, dtype=np.uint64)[:, None]
    words = philox((group, index, 0, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    bits = np.stack(words, axis=-1).reshape(len(indices), -1)[:, :vocab]
    v = (torch.from_numpy(bits.astype(np.float64)) + 0.5) / 2**32
    return -(-(-v).log1p()).log()


def test_the_reference_is_philox() -> None:
    # known answers of the Random123 library
    zeros, ones = philox((0, 0, 0, 0), (0, 0)), philox((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
    assert [int(word) for word in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_highest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, VOCAB + 9, device=DEVICE) * 2).round().to(dtype)[:, :VOCAB]
    logits[3] = -INF
    logits[3, 130] = -5.0
    logits[4] = 7.0
    assert not logits.is_contiguous()
    got = run(logits, [Row()] * 5)
    assert got.tokens == [int((row == row.max()).nonzero()[0]) for row in logits]
    assert got.usable == [1] * 5


@pytest.mark.parametrize("mode", list(SamplingMode))
def test_greedy_rows_do_not_depend_on_the_mode(mode: SamplingMode) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).round().to(DEVICE)
    rows = [Row(replace(GREEDY, top_k=3, top_p=0.5, min_p=0.1), seed=i) for i in range(3)]
    assert run(logits, rows, mode=mode).tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_rows_add_the_noise_of_their_seed_and_index(dtype: torch.dtype) -> None:
    logits = (torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2)) * 2).to(dtype)
    rows = [
        Row(SamplingParams(temperature=1.0), seed=0, output_index=0),
        Row(SamplingParams(temperature=0.7), seed=1, output_index=5),
        Row(SamplingParams(temperature=3.0), seed=-1, output_index=7),
        Row(SamplingParams(temperature=1e30), seed=-(2**63), output_index=2**31 - 1),
        Row(SamplingParams(temperature=1.3), seed=2**63 - 1, output_index=1),
        Row(SamplingParams(temperature=1.3), seed=2**40 + 1, output_index=1),
    ]
    expected = []
    for x, row in zip(logits.double(), rows, strict=True):
        noise = gumbels(row.seed, [row.output_index], VOCAB)[0]
        expected.append(int((x / row.params.temperature + noise).argmax()))
    assert run(logits.to(DEVICE), rows).tokens == expected
    assert run(logits.to(DEVICE), rows, tile=256).tokens == expected


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_noise_draws_from_the_distribution() -> None:
    # 13 degrees of freedom: 48 is exceeded once in 150,000 times
    logits = torch.linspace(-3, 1, 14).double()
    scores = logits + gumbels(1234567, range(200_000), 14)
    counts = torch.bincount(scores.argmax(-1), minlength=14).double()
    assert chi_square(counts, logits.softmax(-1)) < 48


def test_draws_follow_the_distribution() -> None:
    # 3 degrees of freedom: 25 is exceeded once in 65,000 times
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    draws = 100
    rows = [Row(SamplingParams(temperature=2.0), seed=9, output_index=i) for i in range(draws)]
    logits = (probabilities.log() * 2).expand(draws, 4).contiguous().to(DEVICE)
    tokens = torch.tensor(run(logits, rows, tile=4).tokens)
    assert chi_square(torch.bincount(tokens, minlength=4).double(), probabilities) < 25


def filters(count: int) -> list[SamplingParams]:
    """A mixture of settings, each filter present in about half."""
    g = np.random.default_rng(5)
    return [
        SamplingParams(
            temperature=float(np.float32(g.uniform(0.3, 2.5))),
            top_k=int(g.choice([0, 0, 1, 2, 7, 50, 150, VOCAB - 1, VOCAB, 1000])),
            top_p=float(np.float32(g.choice([1.0, 1.0, g.uniform(0.01, 0.999), 0.9]))),
            min_p=float(np.float32(g.choice([0.0, 0.0, 10 ** g.uniform(-6, 0), 1.0]))),
        )
        for _ in range(count)
    ]


def filtered_logits(count: int) -> torch.Tensor:
    logits = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    logits[1::3] = (logits[1::3] / 2).round()  # many equals
    logits[2::6, ::2] = -0.0
    logits[2::6, 1::4] = 0.0
    logits[3::7, 5:100] = -INF
    return logits


@pytest.mark.parametrize(
    ("count", "candidates", "chunk"),
    [
        pytest.param(18, 256, 256, id="among the candidates"),
        pytest.param(8, 16, 256, id="in the whole row where there are too many"),
        pytest.param(5, 256, 32, id="in several chunks"),
        pytest.param(5, 8, 64, id="in several chunks of the whole row"),
    ],
)
def test_filters_keep_what_the_cpu_sampler_keeps(count: int, candidates: int, chunk: int) -> None:
    params, logits = filters(count), filtered_logits(count)
    rows = [Row(each, seed=i, output_index=3) for i, each in enumerate(params)]
    got = run(
        logits.to(DEVICE),
        rows,
        mode=SamplingMode.FILTERED,
        candidates=candidates,
        chunk=chunk,
    )
    for i, (x, each) in enumerate(zip(logits, params, strict=True)):
        kept = filtered_probabilities(x, each) > 0
        if SamplingMode.of([each], VOCAB) == SamplingMode.FILTERED:
            assert float(got.lowest[i]) == float(x[kept].min()), each
        scores = x.double() / each.temperature + gumbels(i, [3], VOCAB)[0]
        assert got.tokens[i] == int(scores.masked_fill(~kept, -INF).argmax()), each
    assert got.usable == [1] * count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("candidates", [256, 8])
def test_filters_on_halves(dtype: torch.dtype, candidates: int) -> None:
    logits = filtered_logits(2).to(dtype)
    params = [SamplingParams(top_k=20, top_p=0.8), SamplingParams(top_p=0.9, min_p=0.01)]
    got = run(logits.to(DEVICE), [Row(each) for each in params], candidates=candidates)
    for i, each in enumerate(params):
        kept = filtered_probabilities(logits[i], each) > 0
        assert float(got.lowest[i]) == float(logits[i][kept].min())


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = filtered_logits(5).to(DEVICE)
    rows = [
        Row(GREEDY, seed=1),
        Row(SamplingParams(), seed=2, output_index=4),
        Row(SamplingParams(top_p=0.9), seed=3),
        Row(SamplingParams(top_k=9, min_p=0.05), seed=4),
        Row(SamplingParams(temperature=1.5), seed=5, suppressed=(3, 77), min_until=1),
    ]
    together = run(logits, rows).tokens
    order = [3, 0, 4, 2, 1]
    shuffled = run(logits[order], [rows[i] for i in order], positions=[6, 2, 0, 4, 3]).tokens
    assert shuffled == [together[i] for i in order]
    alone = [run(logits[i : i + 1], [rows[i]], positions=[2]).tokens[0] for i in range(5)]
    assert alone == together


def test_seeds_and_indices_choose_the_noise() -> None:
    logits = torch.zeros(6, VOCAB, device=DEVICE)
    noises = [(7, 0), (7, 0), (7, 1), (7 + 2**32, 0), (7 - 2**32, 0), (8, 0)]
    rows = [Row(SamplingParams(), seed, index) for seed, index in noises]
    tokens = run(logits, rows).tokens
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 5


@pytest.mark.parametrize("mode", list(SamplingMode))
def test_a_row_that_gives_no_token_is_flagged(mode: SamplingMode) -> None:
    logits = torch.zeros(9, VOCAB)
    logits[:, 150] = 5.0
    logits[1, 202] = NAN
    logits[2] = NAN
    logits[3, 7] = INF
    logits[4] = -INF
    logits[5, 8], logits[5, 9] = INF, -INF
    logits[6, 8], logits[6, 9] = NAN, INF  # both forbidden
    logits[7, 10:] = -INF  # and the others are forbidden
    logits[8, :150] = -INF
    forbidden = {6: (8, 9), 7: tuple(range(10))}
    params = {0: GREEDY, 1: SamplingParams(temperature=0.1)}.get(
        int(mode), SamplingParams(temperature=0.1, top_p=0.9)
    )
    rows = [Row(params, suppressed=forbidden.get(i, ()), min_until=1) for i in range(9)]
    got = run(logits.to(DEVICE), rows, mode=mode)
    assert got.usable == [1, 0, 0, 0, 0, 0, 1, 0, 1]
    assert got.tokens == [150, 0, 0, 0, 0, 0, 150, 0, 150]


@pytest.mark.parametrize(
    ("mode", "candidates"), [*((mode, 256) for mode in SamplingMode), (SamplingMode.FILTERED, 0)]
)
def test_tokens_are_forbidden_before_the_index(mode: SamplingMode, candidates: int) -> None:
    logits = torch.arange(VOCAB).float().expand(3, VOCAB).contiguous().to(DEVICE) * 30
    params = [GREEDY, SamplingParams(), SamplingParams(top_k=1)][mode]
    highest = tuple(range(VOCAB - 16, VOCAB))
    rows = [Row(params, 0, index, highest, min_until=4) for index in (3, 4, 5)]
    got = run(logits, rows, mode=mode, candidates=candidates)
    assert got.tokens == [VOCAB - 17, VOCAB - 1, VOCAB - 1]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to -inf: meant
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_extreme_temperatures_do_not_overflow(top_p: float) -> None:
    logits = torch.full((4, VOCAB), -3e38)
    logits[:, 100] = 3e38
    logits[1, 101] = 2.9e38
    logits[2] = 0.0
    params = [SamplingParams(temperature=t, top_p=top_p) for t in (1e-30, 1e-38, 1e38, 1e-300)]
    got = run(logits.to(DEVICE), [Row(each, seed=3) for each in params])
    uniform = int(gumbels(3, [0], VOCAB)[0].argmax())
    assert got.tokens[0] == got.tokens[1] == got.tokens[3] == 100
    assert top_p < 1.0 or got.tokens[2] == uniform
    assert got.usable == [1] * 4


def test_the_mode_is_the_least_that_serves_all() -> None:
    random, filtered = SamplingParams(), SamplingParams(min_p=0.1)
    all_kept = SamplingParams(top_k=VOCAB)
    assert SamplingMode.of([], VOCAB) == SamplingMode.GREEDY
    assert SamplingMode.of([GREEDY, replace(GREEDY, top_k=1)], VOCAB) == SamplingMode.GREEDY
    assert SamplingMode.of([GREEDY, random, all_kept], VOCAB) == SamplingMode.RANDOM
    assert SamplingMode.of([filtered, random], VOCAB) == SamplingMode.FILTERED


def test_no_rows_are_no_work() -> None:
    empty = torch.empty(0, dtype=torch.int32, device=DEVICE)
    workspace = SamplingWorkspace(1, VOCAB, DEVICE)
    state = SamplingState.allocate(1, DEVICE)
    logits = torch.empty(0, VOCAB, device=DEVICE)
    launch = device_of(DEVICE)
    sample_tokens(logits, empty, state, empty, empty, workspace, SamplingMode.GREEDY, launch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("mode", list(SamplingMode))
def test_a_captured_graph_follows_its_inputs(mode: SamplingMode, pdl: bool) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    vocab, count = 151_936, 8
    state = SamplingState.allocate(count, DEVICE)
    state.temperature.fill_(0.8)
    state.seed.copy_(torch.arange(count))
    state.top_k[::2], state.top_p[::3], state.min_p[3::4] = 40, 0.9, 0.02
    state.top_p[7] = 0.999
    logits = torch.zeros(count, vocab, device=DEVICE)
    rows = torch.arange(count, dtype=torch.int32, device=DEVICE)
    tokens, usable = torch.zeros_like(rows), torch.zeros_like(rows)
    workspace = SamplingWorkspace(count, vocab, DEVICE)

    def step() -> None:
        sample_tokens(
            logits,
            rows,
            state,
            tokens,
            usable,
            workspace,
            mode,
            replace(device_of(DEVICE), pdl=pdl),
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for index in range(20):
        x = torch.randn(count, vocab, generator=torch.Generator().manual_seed(index)) * 3
        logits.copy_(x)
        state.output_index.fill_(index)
        graph.replay()
        expected = []
        for i in range(count):
            params = SamplingParams(
                temperature=float(state.temperature[i]),
                top_k=int(state.top_k[i]) if mode == SamplingMode.FILTERED else 0,
                top_p=float(state.top_p[i]) if mode == SamplingMode.FILTERED else 1.0,
                min_p=float(state.min_p[i]) if mode == SamplingMode.FILTERED else 0.0,
            )
            scores = x[i].double()
            if mode != SamplingMode.GREEDY:
                scores = scores / params.temperature + gumbels(i, [index], vocab)[0]
                scores = scores.masked_fill(filtered_probabilities(x[i], params) <= 0, -INF)
            expected.append(int(scores.argmax()))
        assert tokens.tolist() == expected
        assert usable.tolist() == [1] * count
