"""Sizes of steps, rounded up so that few CUDA graphs serve all. Knows no tensors."""

from __future__ import annotations

MAX_GRAPH_TOKENS = 2048
"""Steps with more tokens run kernel by kernel: the device takes longer than the host."""


def decode_bucket(num_seqs: int) -> int:
    """Sequences of a decode step, rounded up so that few graphs serve all."""
    if num_seqs <= 8:
        return 1 << (num_seqs - 1).bit_length()
    for most, step in ((32, 8), (64, 16), (256, 32)):
        if num_seqs <= most:
            return -(-num_seqs // step) * step
    return -(-num_seqs // 64) * 64


def ragged_seqs(num_seqs: int) -> int:
    """The same for other steps, whose padding costs next to nothing."""
    return max(16, 1 << (-(-(num_seqs - 1).bit_length() // 2) * 2)) if num_seqs > 1 else 16


def token_bucket(num_tokens: int) -> int:
    """Tokens of a step, rounded up to a power of two or one and a half times it."""
    power = max(16, 1 << (num_tokens - 1).bit_length())
    return power * 3 // 4 if power > 16 and num_tokens <= power * 3 // 4 else power


def decode_buckets(max_num_seqs: int) -> int:
    """How many decode steps of different size there are: 1, 2, 4, 8, 16, 24, 32, 48, …"""
    return len({decode_bucket(num_seqs) for num_seqs in range(1, max_num_seqs + 1)})


def largest_step(max_num_batched_tokens: int, max_num_seqs: int) -> tuple[int, int]:
    """(tokens, sequences) that a GPU runner allocates room for."""
    seqs = ragged_seqs(decode_bucket(max_num_seqs))
    tokens = max(max_num_batched_tokens, token_bucket(1), seqs)
    return (token_bucket(tokens) if tokens <= MAX_GRAPH_TOKENS else tokens), seqs
