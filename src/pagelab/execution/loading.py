"""From a model's name to a runner that is ready: the one place where the parts are joined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagelab.attention.select import resolve_attention, select_attention
from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.errors import ConfigError
from pagelab.execution.kv_cache import DTYPES, KVCache
from pagelab.execution.load_progress import LoadProgress, WatchedWeights, loaded_bytes
from pagelab.execution.model_runner import ModelRunner
from pagelab.execution.native_runner import NativeRunner
from pagelab.execution.oom import WEIGHTS, out_of_memory
from pagelab.memory.layout import DTYPE_BYTES
from pagelab.models.decoder import Decoder, Weights
from pagelab.models.device_weights import DeviceWeights
from pagelab.models.fetch import ModelSource
from pagelab.models.native_decoder import QUANTIZATIONS, NativeDecoder, why_not_native
from pagelab.models.random_weights import RandomWeights
from pagelab.models.registry import open_weights
from pagelab.models.spec import ModelSpec
from pagelab.native.library import native
from pagelab.native.packed import Threads
from pagelab.telemetry import available_cores

if TYPE_CHECKING:
    from pagelab.execution.gpu_runner import GpuRunner


KV_CACHE_DTYPES = ("auto", "int8")
"""What K/V may be asked to be kept in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where and in what to compute; `auto` is resolved by `resolve_device`.

    With `random_weights` a model's files are not read: its weights are drawn on the device.
    Without `cuda_graphs` every step runs kernel by kernel. Without `progress` loading shows no
    bar. `quantization` is one of `native_decoder.QUANTIZATIONS`, for the compiled extension, and
    so is a `kv_cache_dtype` of `int8`.
    """

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    threads: int | None = None
    random_weights: bool = False
    cuda_graphs: bool = True
    batch_invariant: bool = False
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    progress: bool = True


def resolve_device(config: DeviceConfig) -> tuple[torch.device, str]:
    """The device and the dtype to use.

    `auto` takes the GPU if torch sees one, bfloat16 there and float32 on a CPU (bfloat16 beside
    quantized weights).

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
        # quantized weights are not exact anyway: then K/V need not take the room
        plain = device.type != "cuda" and config.quantization is None
        dtype = "float32" if plain else "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}: choose auto or one of {', '.join(DTYPES)}")
    return device, dtype


def resolve_backend(config: DeviceConfig, device: torch.device, dtype: str, spec: ModelSpec) -> str:
    """The attention backend that runs a model: `native` is the whole step in the extension.

    Raises:
        ConfigError: a backend that does not exist or run here, or options that need another.
    """
    name = resolve_attention(config.attention, device)
    if name == "native" or (config.attention == "auto" and device.type == "cpu"):
        reason = why_not_native(spec, dtype)
        if reason is None:
            name = "native"
        elif name == "native":
            raise ConfigError(f"--attention native does not run this model: {reason}")
        elif config.quantization is not None:
            raise ConfigError(f"--quantization needs the compiled extension: {reason}")
    if config.quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(
            f"no quantization {config.quantization!r}: choose one of {', '.join(QUANTIZATIONS)}"
        )
    if config.quantization is not None and name != "native":
        raise ConfigError(f"--quantization needs --attention native, on a CPU; here it is {name}")
    if config.batch_invariant and name not in ("native", "triton"):
        raise ConfigError(
            f"--batch-invariant needs --attention native or triton; here it is {name}"
        )
    return name


def resolve_kv_dtype(config: DeviceConfig, backend: str, dtype: str, spec: ModelSpec) -> str:
    """What K/V is kept in under an attention backend: `auto` is the model's dtype.

    Raises:
        ConfigError: an unknown dtype, or int8 where the compiled extension does not run the model.
    """
    wish = config.kv_cache_dtype
    if wish == "auto":
        return dtype
    if wish not in KV_CACHE_DTYPES:
        raise ConfigError(
            f"no --kv-cache-dtype {wish!r}: choose one of {', '.join(KV_CACHE_DTYPES)}"
        )
    if backend != "native":
        reason = why_not_native(spec, dtype) if backend == "cpu" else None
        raise ConfigError(
            f"--kv-cache-dtype {wish} needs --attention native, the compiled extension on a CPU; "
            f"here it is {backend}" + (f": {reason}" if reason else "")
        )
    return wish


def load_runner(
    source: ModelSource,
    spec: ModelSpec,
    config: DeviceConfig,
    *,
    memory: MemoryConfig,
    scheduling: SchedulerConfig,
) -> ModelRunner | NativeRunner | GpuRunner:
    """Read the weights, build the decoder and its KV cache, and the runner for them.

    Raises:
        ModelError: the model's files are broken or not supported.
        ConfigError: an option that does not exist; InsufficientMemoryError: too large a pool.
    """
    device, dtype = resolve_device(config)
    if config.threads is not None:
        if config.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {config.threads}")
        torch.set_num_threads(config.threads)
    name = resolve_backend(config, device, dtype, spec)
    kv_dtype = resolve_kv_dtype(config, name, dtype, spec)
    layout = spec.kv_layout(kv_dtype, memory.block_size)
    fused = name == "triton"
    cache = KVCache(layout, memory.num_blocks, device, scratch_block=fused)
    with torch.inference_mode(), out_of_memory("while loading the weights", device, WEIGHTS):
        with _weights(source, spec, config, device, dtype) as weights:
            if name == "native":
                packed = _native_decoder(spec, weights, dtype, kv_dtype, config)
                return NativeRunner(packed, cache)
            decoder = Decoder(spec, weights, DTYPES[dtype], device, pack=not fused)
        if not fused:
            return ModelRunner(decoder, cache, select_attention(name))
        from pagelab.execution.gpu_runner import GpuRunner

        runner = GpuRunner(
            decoder,
            cache,
            scheduling,
            max_model_len=memory.max_model_len,
            graphs=config.cuda_graphs,
            batch_invariant=config.batch_invariant,
        )
    if device.type == "cuda":  # what loading needed, for the runner's own stream
        torch.cuda.empty_cache()
    return runner


def _native_decoder(
    spec: ModelSpec, weights: Weights, dtype: str, kv_dtype: str, config: DeviceConfig
) -> NativeDecoder:
    found = native()
    assert found is not None, "resolve_backend chose it"
    threads = Threads(found, config.threads or available_cores())
    return NativeDecoder(spec, weights, dtype, config.quantization, threads, kv_dtype)


@contextmanager
def _weights(
    source: ModelSource, spec: ModelSpec, config: DeviceConfig, device: torch.device, dtype: str
) -> Iterator[Weights]:
    """The weights, each made or read when it is taken, on a GPU straight there."""
    size = DTYPE_BYTES[dtype]
    with LoadProgress(loaded_bytes(spec, size), enabled=config.progress) as progress:
        if config.random_weights:
            drawn = RandomWeights(spec, DTYPES[dtype], device)
            yield WatchedWeights(drawn, progress, size)
            return
        stored = open_weights(source, spec)
        if device.type != "cuda":
            yield WatchedWeights(stored, progress, size)
            return
        with DeviceWeights(stored, DTYPES[dtype], device) as sent:
            yield WatchedWeights(sent, progress, size)
