"""The decoder's parts: linear layers packed once, norms, rotary embedding, activations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from pagelab.models.spec import Activation, ModelSpec


class Linear:
    """`x Wᵀ + b`, with W `[out, in]` in the fastest layout that this machine has.

    On a CPU with oneDNN the weight is reordered once into oneDNN's own blocked layout (the
    operation that torch's compiler uses when it freezes a model): half the time of `F.linear`
    for one to 24 rows (docs/log.md). Elsewhere, or with `pack` off, it is `F.linear`.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool = True
    ) -> None:
        self.bias = bias
        self.packed = pack and _can_pack(weight)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[rows, in]` → `[rows, out]`."""
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return out
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype is torch.float32:
        return True
    return weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Norm:
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(
        self, kind: str, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        self.kind, self.eps, self.weight, self.bias = kind, eps, weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension of x."""
        shape = (x.shape[-1],)
        if self.kind == "layernorm":
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        if x.dtype is torch.float32:
            return F.rms_norm(x, shape, self.weight, self.eps)
        # the mean square in float32, the product in the model's dtype, as the models were trained
        return self.weight * F.rms_norm(x.float(), shape, eps=self.eps).to(x.dtype)


def activation(name: Activation, x: torch.Tensor) -> torch.Tensor:
    """An activation by the name that the spec gives it."""
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class RotaryEmbedding:
    """Rotary positions: each pair (i, i + D/2) of a head is turned by position · frequency i.

    ::

        rotate(x) = x · cos + half_turn(x) · sin,   half_turn([a | b]) = [-b | a]

    cos and sin are computed in float32 for the positions of a step, once for all layers: a
    table of all positions would take 128 MiB for Llama 3.1's 131,072.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(spec).to(device)

    def table(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin for these positions, each `[T, 1, D]`."""
        angles = positions.float()[:, None] * self.frequencies[None, :]
        cos, sin = angles.cos(), angles.sin()
        # the half turn's signs are folded in: swapped halves of x times [-sin | sin]
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.to(dtype)[:, None, :], sin.to(dtype)[:, None, :]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x `[T, heads, D]` by a table of `RotaryEmbedding.table`."""
    half = x.shape[-1] // 2
    return x * cos + x.roll(half, dims=-1) * sin


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Rotary frequencies `[D / 2]`, Llama 3's scaling applied where the spec asks for it."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponent
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # turns that a frequency makes within the original context: few are stretched by the
    # factor, many are kept, and between the two bounds it goes over smoothly
    turns = scaling.original_max_position / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
