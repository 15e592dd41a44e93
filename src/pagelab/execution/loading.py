"""From a model's name to a runner that is ready: the one place where the parts are joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagelab.attention.select import select_attention
from pagelab.errors import ConfigError
from pagelab.execution.kv_cache import DTYPES, KVCache
from pagelab.execution.model_runner import ModelRunner
from pagelab.models.decoder import Decoder
from pagelab.models.fetch import ModelSource
from pagelab.models.registry import load_weights
from pagelab.models.spec import ModelSpec

_DEFAULT_CPU_KV = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where and in what to compute; `auto` is resolved by `resolve_device`."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    threads: int | None = None


def resolve_device(config: DeviceConfig) -> tuple[torch.device, str]:
    """The device and the dtype to use.

    `auto` takes the GPU if torch sees one, bfloat16 there and float32 on a CPU.

    Raises:
        ConfigError: a device that is not there, or an unknown dtype.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: see `pagelab check`, or use cpu")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}: choose auto or one of {', '.join(DTYPES)}")
    return device, dtype


def default_kv_memory(device: torch.device) -> int:
    """Bytes for K/V when the user gives none: 1 GiB on a CPU, half of a GPU's free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return _DEFAULT_CPU_KV


def load_runner(
    source: ModelSource,
    spec: ModelSpec,
    config: DeviceConfig,
    *,
    num_blocks: int,
    block_size: int,
) -> ModelRunner:
    """Read the weights, build the decoder and its KV cache.

    Raises:
        ModelError: the model's files are broken or not supported.
        ConfigError: an option that does not exist; InsufficientMemoryError: too large a pool.
    """
    device, dtype = resolve_device(config)
    if config.threads is not None:
        if config.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {config.threads}")
        torch.set_num_threads(config.threads)
    attention = select_attention(config.attention)
    cache = KVCache(spec.kv_layout(dtype, block_size), num_blocks, device)
    with torch.inference_mode():
        weights = load_weights(source, spec)
        decoder = Decoder(spec, weights, DTYPES[dtype], device)
    return ModelRunner(decoder, cache, attention)
