"""K/V in bytes as the extension keeps it, written down a second time: for tests against floats.

One block of one head (`csrc/int8_attention.h`), B slots of D numbers::

    K   [D / 4, B, 4]   V   [B / 4, D, 4] (B not a multiple of 4: [B, D])   bytes of value + 128
    both: B float32 scales behind them
"""

from __future__ import annotations

import torch


def pack(cache: torch.Tensor) -> torch.Tensor:
    """Floats `[2, kv_heads, num_blocks, B, D]` → uint8 `[2, kv_heads, num_blocks, B, D + 4]`."""
    *head, size, dim = cache.shape
    scales = cache.abs().amax(dim=-1) / 127
    values = (cache / scales.clamp_min(1e-30)[..., None]).round().to(torch.int16) + 128
    k, v = values.to(torch.uint8)
    lead = (*head[1:],)
    k = k.view(*lead, size, dim // 4, 4).transpose(-2, -3)
    if size % 4 == 0:
        v = v.view(*lead, size // 4, 4, dim).transpose(-1, -2)
    flat = torch.stack([k.reshape(*lead, size * dim), v.reshape(*lead, size * dim)])
    tails = scales.float().contiguous().view(torch.uint8)
    return torch.cat([flat, tails], dim=-1).view(*head, size, dim + 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The floats that packed K/V stands for, `[2, kv_heads, num_blocks, B, D]`."""
    *head, size, wide = packed.shape
    dim, lead = wide - 4, (*head[1:],)
    flat = packed.reshape(*head, size * wide)
    scales = flat[..., size * dim :].contiguous().view(torch.float32)
    k, v = flat[..., : size * dim].float() - 128
    k = k.view(*lead, dim // 4, size, 4).transpose(-2, -3).reshape(*lead, size, dim)
    if size % 4 == 0:
        v = v.view(*lead, size // 4, dim, 4).transpose(-1, -2)
    return torch.stack([k, v.reshape(*lead, size, dim)]) * scales[..., None]
