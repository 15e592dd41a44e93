"""Paged attention for CPUs, from torch's own operations.

Two shapes of work, chosen by what a sequence brings:

- **one query**: sequences of similar length go together. Their blocks are gathered whole (one
  `index_select` of rows of `block_size · D` numbers) into a padded batch that fits into the
  cores' caches, grouped query heads share each K/V head, and two batched products do the rest.
- **several queries** (a prompt or a chunk of one): torch's fused attention, on this step's own
  k and v where the whole context is new, on gathered ones otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from pagelab.attention.base import Span

# A group's shortest context is at least this share of its longest: padding is gathered and
# multiplied like the rest, but every group costs some 40 µs a layer in dispatch.
_MIN_FILL = 0.6

# Padded tokens a group may hold: 24 rows of 384 tokens in one group took 10 times as long as
# 24 of 128, since what is gathered no longer stayed in the cores' caches (docs/log.md).
_MAX_GROUP_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one query each, padded to the longest context among them."""

    rows: torch.Tensor  # [B] rows of q
    # [2 · kv_heads · B · blocks a row]: where each (K or V, head, block) lies in the cache seen as
    # rows of block_size · D; short contexts are padded with a block that the mask hides
    gather: torch.Tensor
    mask: torch.Tensor  # [B, 1, keys], added to the scores: 0 or -inf


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several queries."""

    rows: slice
    blocks: torch.Tensor | None  # None: the context is this step's own k and v
    num_keys: int
    mask: torch.Tensor | None  # [queries, keys]; None: plain causal


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step's work."""

    groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]


class CpuAttention:
    """See the module. Also runs on a GPU, without being written for one."""

    name = "cpu"

    def __init__(self) -> None:
        self._scratch = torch.empty(0)  # gathered K/V; kept, since fresh pages cost more than use

    def plan(self, spans: Sequence[Span], cache: torch.Tensor) -> CpuPlan:
        """Sort the step's sequences into groups and build their indices and masks."""
        singles = sorted(
            (span for span in spans if span.num_queries == 1), key=lambda span: span.num_keys
        )
        groups: list[_DecodeGroup] = []
        while singles:
            longest = singles[-1].num_keys
            group = [span for span in singles if span.num_keys >= _MIN_FILL * longest]
            group = group[-max(1, _MAX_GROUP_TOKENS // longest) :]
            groups.append(_decode_group(group, cache))
            del singles[len(singles) - len(group) :]
        chunks = tuple(_chunk(span, cache.device) for span in spans if span.num_queries > 1)
        return CpuPlan(tuple(groups), chunks)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        plan: CpuPlan,
        scale: float,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        out = torch.empty_like(q)
        for group in plan.groups:
            out[group.rows] = _attend_group(
                q[group.rows], self._gather(cache, group.gather), group, scale
            )
        for chunk in plan.chunks:
            out[chunk.rows] = _attend_chunk(q, k, v, cache, chunk, scale)
        return out

    def _gather(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """These rows of the cache in the scratch, `[rows, block_size · D]`.

        There is an index for each head, although the blocks are the same for all: along the
        first dimension torch gathers with all threads, along others with one.
        """
        shape = (len(rows), cache.shape[-2] * cache.shape[-1])
        scratch = self._scratch
        if scratch.numel() < math.prod(shape) or scratch.dtype != cache.dtype:
            self._scratch = scratch = cache.new_empty(math.prod(shape))
        out = scratch[: math.prod(shape)].view(shape)
        return torch.index_select(cache.view(-1, shape[1]), 0, rows, out=out)


def _decode_group(group: list[Span], cache: torch.Tensor) -> _DecodeGroup:
    _, kv_heads, num_blocks, block_size, _ = cache.shape
    device = cache.device
    width = max(-(-span.num_keys // block_size) for span in group)
    blocks: list[int] = []
    for span in group:
        used = span.block_ids[: -(-span.num_keys // block_size)]
        blocks += used
        blocks += [used[0]] * (width - len(used))
    lengths = torch.tensor([span.num_keys for span in group], device=device)
    hidden = torch.arange(width * block_size, device=device) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)
    rows = torch.tensor([span.row for span in group], device=device)
    heads = torch.arange(2 * kv_heads, device=device)[:, None] * num_blocks
    gather = (heads + torch.tensor(blocks, device=device)).flatten()
    return _DecodeGroup(rows, gather, mask[:, None, :])


def _attend_group(
    q: torch.Tensor, gathered: torch.Tensor, group: _DecodeGroup, scale: float
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_keys = group.mask.shape[-1]
    kv_heads = gathered.numel() // (2 * batch * num_keys * head_dim)
    keys, values = gathered.view(2, kv_heads * batch, num_keys, head_dim)
    # heads outermost, as the gather leaves K/V: [kv_heads · B, G, D]
    queries = q.view(batch, kv_heads, -1, head_dim).transpose(0, 1)
    scores = torch.bmm(queries.reshape(kv_heads * batch, -1, head_dim), keys.transpose(1, 2))
    scores = scores.view(kv_heads, batch, -1, num_keys).float() * scale + group.mask
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    out = torch.bmm(weights.view(kv_heads * batch, -1, num_keys), values)
    out = out.view(kv_heads, batch, -1, head_dim).transpose(0, 1)
    return out.reshape(batch, num_heads, head_dim)


def _chunk(span: Span, device: torch.device) -> _Chunk:
    rows = slice(span.row, span.row + span.num_queries)
    if span.num_queries == span.num_keys:
        return _Chunk(rows, None, span.num_keys, None)
    blocks = torch.tensor(span.block_ids, device=device)
    offset = span.num_keys - span.num_queries
    mask = torch.ones(span.num_queries, span.num_keys, dtype=torch.bool, device=device)
    return _Chunk(rows, blocks, span.num_keys, mask.tril(offset))


def _attend_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    chunk: _Chunk,
    scale: float,
) -> torch.Tensor:
    queries = q[chunk.rows].transpose(0, 1)
    if chunk.blocks is None:
        keys, values = k[chunk.rows].transpose(0, 1), v[chunk.rows].transpose(0, 1)
    else:
        gathered = cache.index_select(2, chunk.blocks).flatten(2, 3)[:, :, : chunk.num_keys]
        keys, values = gathered[0], gathered[1]
    out = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
