"""The inputs of a step in which sequences bring several tokens each, as one array of words.

The host knows all of it but the ids of tokens that are still being sampled::

    words | token_ids T | token_rows T | positions T | order S | samples S | counts S | last S
          | tiles | number of tiles | items | number of items

Tiles are for sequences with several tokens (`kernels.paged_prefill`), items for those with one
(`kernels.paged_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch

from pagelab.kernels.decode_items import cut_items
from pagelab.kernels.paged_prefill import cut_tiles
from pagelab.kernels.sizes import DESCRIPTOR, TILE, aligned
from pagelab.scheduling.batch import ScheduledSequence


@dataclass(frozen=True, slots=True)
class RaggedShape:
    """How many of each thing a step has room for.

    Attributes:
        tokens: T.
        seqs: S.
        tile: queries of a tile.
        target_items: items that the K/V of single tokens is cut into, about.
        tiles_only: single tokens are tiles, too.
    """

    tokens: int
    seqs: int
    tile: int
    target_items: int
    tiles_only: bool = False

    @property
    def tiles(self) -> int:
        """Tiles at most: each sequence may end with one that is not full."""
        return self.tokens // self.tile + min(self.seqs, self.tokens)

    @property
    def items(self) -> int:
        """Items at most."""
        return self.seqs + self.target_items

    def places(self) -> dict[str, slice]:
        """Where each part lies, in their order."""
        return _places(self)

    @property
    def num_words(self) -> int:
        """Words of all parts."""
        return aligned(max(place.stop for place in self.places().values()))


@lru_cache(maxsize=1024)
def _places(shape: RaggedShape) -> dict[str, slice]:
    t, s = shape.tokens, shape.seqs
    sizes = {
        "token_ids": t,
        "token_rows": t,
        "positions": t,
        "order": s,
        "samples": s,
        "counts": s,
        "last": s,
        "tiles": shape.tiles * TILE,
        "num_tiles": 1,
        "items": shape.items * DESCRIPTOR,
        "num_items": 1,
    }
    starts = accumulate(map(aligned, sizes.values()), initial=0)
    return {name: slice(at, at + sizes[name]) for name, at in zip(sizes, starts, strict=False)}


def split(words: torch.Tensor, shape: RaggedShape) -> dict[str, torch.Tensor]:
    """The parts of such an array, as views."""
    found = {name: words[place] for name, place in shape.places().items()}
    found["tiles"] = found["tiles"].view(-1, TILE)
    found["items"] = found["items"].view(-1, DESCRIPTOR)
    return found


def fill(
    words: np.ndarray,
    shape: RaggedShape,
    parts: Sequence[ScheduledSequence],
    rows: Sequence[int],
    scratch: int,
) -> None:
    """Write a batch into `words` (int32, `[shape.num_words]`)."""
    places = {name: words[place] for name, place in shape.places().items()}
    counts = np.array([part.num_tokens for part in parts], np.int32)
    starts = np.array([part.start for part in parts], np.int32)
    own = np.array(rows, np.int32)
    num_tokens, num_seqs = int(counts.sum()), len(parts)
    first = np.cumsum(counts) - counts

    ids: list[int] = []
    for part in parts:
        ids += part.token_ids
        if len(part.token_ids) < part.num_tokens:
            ids += [-1] * (part.num_tokens - len(part.token_ids))
    _padded(places["token_ids"], ids, 0)
    _padded(places["token_rows"], np.repeat(own, counts), scratch)
    within = np.arange(num_tokens, dtype=np.int32) - np.repeat(first, counts)
    _padded(places["positions"], np.repeat(starts, counts) + within, 0)
    _padded(places["order"], own, scratch)
    _padded(places["samples"], [part.samples for part in parts], 0)
    _padded(places["counts"], counts, 0)
    _padded(places["last"], first + counts - 1, 0)

    several = (counts > 1) | shape.tiles_only
    tiles = cut_tiles(own[several], first[several], counts[several], starts[several], shape.tile)
    places["tiles"][: tiles.size] = tiles.reshape(-1)
    places["num_tiles"][0] = len(tiles)
    places["num_items"][0] = 0
    one = np.flatnonzero(~several)
    if one.size:
        items = cut_items(
            np.arange(num_seqs)[one], own[one], first[one], starts[one], shape.target_items
        )
        places["items"][: items.size] = items.reshape(-1)
        places["num_items"][0] = len(items)


def _padded(place: np.ndarray, values: Sequence[int] | np.ndarray, padding: int) -> None:
    place[: len(values)] = values
    place[len(values) :] = padding
