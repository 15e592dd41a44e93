"""Pick an attention backend by name."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

from pagelab.attention.base import AttentionBackend
from pagelab.errors import ConfigError
from pagelab.native.library import why_no_native

if TYPE_CHECKING:
    import torch

BACKENDS = ("cpu", "native", "reference", "triton")

_OLDEST_CAPABILITY = (8, 0)
"""Compute capability that the Triton kernels need: bfloat16 on the matrix units."""

_NOT_INSTALLED = "triton is not installed (it comes with torch for CUDA)"


def resolve_attention(name: str, device: torch.device) -> str:
    """The name of a backend; `auto` takes the fastest that runs on this device.

    On a CPU that is `cpu` here; where the extension runs the model, `execution.loading` takes it.

    Raises:
        ConfigError: there is none of that name, or it does not run here.
    """
    if name == "auto":
        on_gpu = device.type == "cuda" and why_no_triton(device) is None
        return "triton" if on_gpu else "cpu"
    if name not in BACKENDS:
        raise ConfigError(
            f"no attention backend {name!r}: choose auto or one of {', '.join(BACKENDS)}"
        )
    reason = None
    if name == "triton":
        reason = why_no_triton(device)
    elif name == "native":
        reason = why_no_native() if device.type == "cpu" else f"it is for CPUs, not {device.type}"
    if reason is not None:
        raise ConfigError(f"--attention {name} does not run here: {reason}")
    return name


def why_no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on a device; None where they do."""
    if importlib.util.find_spec("triton") is None:
        return _NOT_INSTALLED
    if device.type != "cuda":
        from triton import knobs

        # Triton's interpreter runs them on a CPU, for tests
        return None if knobs.runtime.interpret else f"it needs an NVIDIA GPU, not {device.type}"
    import torch

    return why_no_triton_on(torch.cuda.get_device_capability(device))


def why_no_triton_on(capability: tuple[int, int]) -> str | None:
    """Why they do not run on a GPU of this compute capability; asks no torch."""
    if importlib.util.find_spec("triton") is None:
        return _NOT_INSTALLED
    if capability < _OLDEST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, _OLDEST_CAPABILITY))
        return f"this GPU has compute capability {have}, and it needs {need}"
    if "CC" not in os.environ and not any(shutil.which(name) for name in ("clang", "gcc")):
        return "Triton builds its launchers with a C compiler: install gcc or clang, or set CC"
    return None


def select_attention(name: str) -> AttentionBackend:
    """The backend of this name (not `auto`).

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "cpu":
        from pagelab.attention.cpu import CpuAttention

        return CpuAttention()
    if name == "native":
        from pagelab.attention.native import NativeAttention

        return NativeAttention()
    if name == "reference":
        from pagelab.attention.reference import ReferenceAttention

        return ReferenceAttention()
    if name == "triton":
        from pagelab.attention.triton_paged import TritonAttention

        return TritonAttention()
    raise ConfigError(f"no attention backend {name!r}: choose auto or one of {', '.join(BACKENDS)}")
