"""The KV cache: the tensors behind the block ids."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from pagelab.config import format_bytes
from pagelab.execution.oom import POOL, out_of_memory
from pagelab.memory.layout import KVLayout
from pagelab.types import BlockId

# of numbers that torch computes with
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """One tensor a layer, `[2, kv_heads, num_blocks, block_size, D]`: K at 0, V at 1.

    Heads are outermost, so that one block of one head is one contiguous row of
    `block_size · D` numbers, and gathering a context leaves it ready for a product.

    In int8 the numbers are bytes, `[2, kv_heads, num_blocks, block_size, D + 4]`: a block of a head
    has all its values, in an order that only the compiled extension reads
    (`csrc/int8_attention.h`), then a float32 scale a slot. A block is whole in its row, so that
    whoever copies or clears blocks takes the scales along.

    Args:
        layout: of the K/V.
        num_blocks: of the pool.
        device: where.
        scratch_block: one block more, behind the pool's (id `num_blocks`), for padding to write to.

    Raises:
        InsufficientMemoryError: the device cannot give that much.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        *,
        scratch_block: bool = False,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        blocks = num_blocks + scratch_block
        dtype = torch.uint8 if layout.dtype == "int8" else DTYPES[layout.dtype]
        numbers = layout.head_bytes // dtype.itemsize
        shape = (2, layout.num_kv_heads, blocks, layout.block_size, numbers)
        pool = format_bytes(num_blocks * layout.bytes_per_block)
        with out_of_memory(f"for a KV pool of {pool}", device, POOL):
            # zeros, not empty: attention multiplies hidden slots by 0, which a NaN survives
            self.layers = [_zeros(shape, dtype, device) for _ in range(layout.num_layers)]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v `[T, kv_heads, D]` into these slots `[T]` of a layer (not in int8)."""
        assert self.layout.dtype != "int8", "only the extension writes int8"
        cache = self.layers[layer].view(2, self.layout.num_kv_heads, -1, self.layout.head_dim)
        cache[0].index_copy_(1, slots, k.transpose(0, 1))
        cache[1].index_copy_(1, slots, v.transpose(0, 1))

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy whole blocks (from, to), all of them as they were before the first copy."""
        if copies:
            source, target = (list(ids) for ids in zip(*copies, strict=True))
            for cache in self.layers:
                cache[:, :, target] = cache[:, :, source]

    def clear_blocks(self, block_ids: Sequence[BlockId]) -> None:
        """Zero blocks whose content must not reach anyone (a NaN survives a masked product)."""
        for cache in self.layers:
            cache[:, :, list(block_ids)] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU the system's own zero pages, which take room when they are first touched.

    `torch.zeros` writes them: a pool of 1 GiB then takes 1 GiB and half a second at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # a map of its own, not numpy's zeros: those are in huge pages, which few blocks fill
    try:
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(str(error)) from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
