"""How many bytes K/V takes: asked here, multiplied out nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.errors import ConfigError, InsufficientMemoryError, UnsupportedModelError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number, by the dtypes that weights and K/V may have."""

KV_DTYPES = (*DTYPE_BYTES, "int8")
"""What K/V may be kept in. `int8`: a byte a number, and a float32 scale for each token's K and V
of each head."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The geometry of one group of layers' K/V.

    One block of one layer, as tensors are laid out (`execution.kv_cache`)::

        [K|V, kv_head, slot in block, head_dim]

    A block id means the same block in every layer of the group.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int

    def __post_init__(self) -> None:
        if self.dtype not in KV_DTYPES:
            raise UnsupportedModelError(f"K/V in {self.dtype}: use one of {', '.join(KV_DTYPES)}")
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, not {self.block_size}")

    @property
    def head_bytes(self) -> int:
        """Bytes of one token's K (or V) of one head of one layer, its scale included."""
        if self.dtype == "int8":
            return self.head_dim + 4
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers of the group."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_bytes

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block, all layers of the group."""
        return self.block_size * self.bytes_per_token

    def num_blocks(self, kv_memory: int) -> int:
        """Whole blocks that fit into a budget of bytes.

        Raises:
            InsufficientMemoryError: not even one fits.
        """
        return whole_blocks(kv_memory, self.block_size, self.bytes_per_token)


def whole_blocks(kv_memory: int, block_size: int, bytes_per_token: int) -> int:
    """Blocks of so many tokens that fit into a budget of bytes.

    Raises:
        InsufficientMemoryError: not even one fits.
    """
    blocks = kv_memory // (block_size * bytes_per_token)
    if blocks == 0:
        raise InsufficientMemoryError(
            f"the KV budget of {kv_memory:,} bytes holds no block of {block_size} tokens "
            f"({block_size * bytes_per_token:,} bytes each): raise --kv-memory or lower "
            "--block-size"
        )
    return blocks
