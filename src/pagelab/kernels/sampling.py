"""Logits to tokens on the device: fixed grids, no synchronisation, fit for a CUDA graph.

A random row takes `argmax(logit / temperature + g)` over the tokens that its filters keep. That
draws from the softmax if the g are independent Gumbel numbers. They come from Philox, with the
row's seed as the key and (token id, index in the output) as the counter, so a row's token depends
on its logits, its seed and that index only: not on its batch, and not on how the work is cut.

The vocabulary is cut into tiles. What a step launches depends on its mode, which the host knows::

    greedy, random   scan_logits        (rows, tiles)  best score of each tile
                     draw_tokens        (rows)         best tile
    filtered         scan_logits        (rows, tiles)  also: only the highest logit, for rows with
                                                       filters
                     weigh_levels       (rows, tiles)  count and mass above 16 fixed levels below
                                                       the highest
                     gather_candidates  (rows, tiles)  tokens above the lowest level that can
                                                       matter, in order
                     draw_tokens        (rows)         exact thresholds among those, and the draw

    x highest ──┬──────────────┬─────────────────────┬───────── lowest
                level 0        threshold (searched)  level n: the candidates end here

The levels make the search short where the filters keep little. Of 151,936 Gaussian logits with a
standard deviation of 3, top-k 20 and 50 leave 24 and 120 candidates at temperature 1, and top-p
0.95 leaves 672 at 0.6. Flat rows leave more than the workspace has room for (30,394 in the last
case at temperature 1): there one program searches the whole row, which is slow, to the same result.
Rows without filters leave `weigh_levels` and `gather_candidates` at once.

Thresholds are exact for top-k. Sums of probabilities are float32 here and float64 in
`pagelab.execution.sampler`: a top-p that a sum meets to within about 1e-6 may fall either way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
import triton

from pagelab.kernels.launch import Device
from pagelab.kernels.sampling_kernels import (
    draw_tokens,
    gather_candidates,
    scan_logits,
    weigh_levels,
)
from pagelab.kernels.sizes import (
    MAX_SUPPRESSED,
    SAMPLING_CANDIDATES,
    SAMPLING_TILE,
)
from pagelab.kernels.sizes import SAMPLING_LEVELS as LEVELS
from pagelab.types import SamplingParams


class SamplingMode(IntEnum):
    """What the rows of a step need; each includes the ones before."""

    GREEDY = 0
    RANDOM = 1
    FILTERED = 2

    @classmethod
    def of(cls, params: Iterable[SamplingParams], vocab_size: int) -> SamplingMode:
        """The least mode that serves all of them."""
        mode = cls.GREEDY
        for each in params:
            if not each.greedy:
                filtered = 0 < each.top_k < vocab_size or each.top_p < 1.0 or each.min_p > 0.0
                mode = max(mode, cls.FILTERED if filtered else cls.RANDOM)
        return mode


@dataclass(frozen=True, slots=True)
class SamplingState:
    """The parameters of all sequences, one row each, on the device. All contiguous.

    Attributes:
        temperature: `[R]` float32; 0 is greedy. Below 1e-30 it counts as that.
        top_k: `[R]` int32; 0 keeps all.
        top_p, min_p: `[R]` float32; 1 and 0 keep all.
        seed: `[R]` int64, any 64 bits.
        output_index: `[R]` int32, of the token to be sampled now.
        suppressed: `[R, 16]` int32; the first `num_suppressed` are forbidden ids.
        num_suppressed: `[R]` int32.
        min_until: `[R]` int32; they are forbidden while `output_index` is below this.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    output_index: torch.Tensor
    suppressed: torch.Tensor
    num_suppressed: torch.Tensor
    min_until: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, device: torch.device) -> SamplingState:
        """Rows that are greedy and forbid nothing."""

        def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        return cls(
            temperature=filled(0.0, torch.float32),
            top_k=filled(0, torch.int32),
            top_p=filled(1.0, torch.float32),
            min_p=filled(0.0, torch.float32),
            seed=filled(0, torch.int64),
            output_index=filled(0, torch.int32),
            suppressed=torch.zeros(num_rows, MAX_SUPPRESSED, dtype=torch.int32, device=device),
            num_suppressed=filled(0, torch.int32),
            min_until=filled(0, torch.int32),
        )

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The tensors in the order of the fields, as the kernels take them."""
        return tuple(getattr(self, each.name) for each in fields(self))


class SamplingWorkspace:
    """What the kernels hand to each other: about 43 KB a row at a vocabulary of 150,000.

    Args:
        max_rows: rows of logits at most.
        vocab_size: of the model.
        device: where.
        tile: tokens that one program reads; a power of two, at least 4.
        candidates: tokens of a row that the threshold search has room for; 0 always searches the
            whole row.
        chunk: tokens that `draw_tokens` looks at together; a power of two.

    Attributes:
        lowest: `[max_rows]` float32, the lowest logit that a row's filters kept; written for the
            rows that have filters.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        *,
        tile: int = SAMPLING_TILE,
        candidates: int = SAMPLING_CANDIDATES,
        chunk: int = 1024,
    ) -> None:
        self.max_rows, self.vocab_size = max_rows, vocab_size
        self.tile, self.chunk, self.num_candidates = tile, chunk, candidates
        self.num_tiles = triton.cdiv(vocab_size, tile)

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(max_rows, *shape, dtype=dtype, device=device)

        self.peaks = empty(torch.float32, self.num_tiles)
        self.scores = empty(torch.float32, self.num_tiles)
        self.tokens = empty(torch.int32, self.num_tiles)
        self.counts = empty(torch.int32, self.num_tiles, LEVELS)
        self.masses = empty(torch.float32, self.num_tiles, LEVELS)
        self.values = empty(torch.float32, candidates)
        self.ids = empty(torch.int32, candidates)
        self.lowest = empty(torch.float32)


def sample_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    state: SamplingState,
    tokens: torch.Tensor,
    usable: torch.Tensor,
    workspace: SamplingWorkspace,
    mode: SamplingMode,
    device: Device,
) -> None:
    """Sample one token for each row of logits.

    Args:
        logits: `[S, V]` float32, bfloat16 or float16, last dimension contiguous.
        rows: `[S]` int32, each one's row in the state.
        state: the parameters.
        tokens: `[S]` int32, written. 0 where a row is not usable.
        usable: `[S]` int32, written: 1, or 0 where a row (without its forbidden tokens) holds a
            NaN or its highest logit is not finite.
        workspace: for at least S rows and exactly V tokens; free again when this is done.
        mode: at least what these rows need (`SamplingMode.of`). Below that, rows with filters
            are sampled without them (RANDOM) and all rows greedily (GREEDY).
        device: how to launch.
    """
    num_rows, vocab = logits.shape
    assert num_rows <= workspace.max_rows, f"workspace for {workspace.max_rows} rows"
    assert vocab == workspace.vocab_size, f"workspace for {workspace.vocab_size} tokens"
    assert logits.stride(1) == 1, "logits must be row-major"
    if num_rows == 0:
        return
    w = workspace
    stride = logits.stride(0)
    tiles = triton.next_power_of_2(w.num_tiles)
    inputs = (logits, rows, *state.arguments())
    grid = (num_rows, w.num_tiles)
    sizes = (vocab, stride)
    device.launch(
        scan_logits,
        grid,
        *inputs,
        w.peaks,
        w.scores,
        w.tokens,
        *sizes,
        w.tile,
        MAX_SUPPRESSED,
        int(mode),
        device.pdl,
        num_warps=4,
    )
    if mode == SamplingMode.FILTERED:
        device.launch(
            weigh_levels,
            grid,
            *inputs,
            w.peaks,
            w.counts,
            w.masses,
            *sizes,
            w.tile,
            tiles,
            min(w.tile, 256),
            MAX_SUPPRESSED,
            LEVELS,
            device.pdl,
            num_warps=4,
        )
        device.launch(
            gather_candidates,
            grid,
            *inputs,
            w.peaks,
            w.counts,
            w.masses,
            w.values,
            w.ids,
            *sizes,
            w.num_candidates,
            w.tile,
            tiles,
            MAX_SUPPRESSED,
            LEVELS,
            device.pdl,
            num_warps=4,
        )
    device.launch(
        draw_tokens,
        (num_rows,),
        *inputs,
        w.peaks,
        w.scores,
        w.tokens,
        w.counts,
        w.masses,
        w.values,
        w.ids,
        w.lowest,
        tokens,
        usable,
        *sizes,
        w.num_tiles,
        w.num_candidates,
        tiles,
        w.chunk,
        MAX_SUPPRESSED,
        LEVELS,
        int(mode),
        device.pdl,
        num_warps=8 if mode == SamplingMode.FILTERED else 1,
    )
