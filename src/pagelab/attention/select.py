"""Pick an attention backend by name."""

from __future__ import annotations

from pagelab.attention.base import AttentionBackend
from pagelab.errors import ConfigError

BACKENDS = ("cpu", "reference")


def select_attention(name: str = "auto") -> AttentionBackend:
    """The backend of this name; `auto` takes the fastest that runs here.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in ("auto", "cpu"):
        from pagelab.attention.cpu import CpuAttention

        return CpuAttention()
    if name == "reference":
        from pagelab.attention.reference import ReferenceAttention

        return ReferenceAttention()
    raise ConfigError(f"no attention backend {name!r}: choose auto or one of {', '.join(BACKENDS)}")
