"""Which block holds which content: a hash chain over the tokens of full blocks.

A block's hash covers its parent's hash, its own tokens and extra keys, so equal hashes mean
equal content *and* equal everything before it::

    tokens   [ t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9 …
    hash     h0 = H(extra, t0..t3)   h1 = H(h0, t4..t7)   (a partial block has no hash)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType

from pagelab.types import BlockId

BlockHash = NewType("BlockHash", bytes)

_DIGEST_BYTES = 16  # 128 bits: a collision would hand one request another's K/V


def root_hash(*extra_keys: bytes) -> BlockHash:
    """The parent of a first block. Extra keys (adapter, tenant, …) keep prefixes apart."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for key in extra_keys:
        digest.update(len(key).to_bytes(4, "little"))
        digest.update(key)
    return BlockHash(digest.digest())


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of one full block of tokens after `parent`."""
    content = parent + array("I", token_ids).tobytes()
    return BlockHash(blake2b(content, digest_size=_DIGEST_BYTES).digest())


class PrefixCache:
    """The map between content and blocks. Holds no blocks: the pool does.

    The first block with some content keeps the entry; later ones with the same content are
    ordinary blocks that are not found.
    """

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def holds(self, block_id: BlockId) -> bool:
        """Whether this block can be found by its content."""
        return block_id in self._hash_of

    def hash_of(self, block_id: BlockId) -> BlockHash | None:
        """The hash under which this block is found; None if it is not."""
        return self._hash_of.get(block_id)

    def find(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """The blocks of the longest known prefix of this chain."""
        found: list[BlockId] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        """Make a full block findable, unless another block has this content already."""
        assert block_id not in self._hash_of, f"block {block_id} is registered already"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def forget(self, block_id: BlockId) -> None:
        """Drop a block whose content is about to be overwritten."""
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def check_invariants(self) -> None:
        """Assert that the two maps mirror each other."""
        assert len(self._block_of) == len(self._hash_of)
        for block_hash, block_id in self._block_of.items():
            assert self._hash_of[block_id] == block_hash
