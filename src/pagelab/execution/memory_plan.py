"""From a device and a model's spec to the budget that the engine is built by."""

from __future__ import annotations

import torch

from pagelab.config import SchedulerConfig
from pagelab.errors import ConfigError
from pagelab.execution.footprint import StepLimits, gpu_footprint, plain_footprint
from pagelab.memory.budget import (
    DEFAULT_UTILIZATION,
    DeviceMemory,
    MemoryBudget,
    budget_from_free_memory,
    budget_from_kv_memory,
)
from pagelab.models.spec import ModelSpec
from pagelab.telemetry import ram

CPU_KV_MEMORY = 1 << 30
"""Bytes for K/V on a CPU where nobody says."""


def measure_device(device: torch.device) -> DeviceMemory:
    """A device's memory now, what other programs hold respected.

    What this process holds no more is given back first; its CUDA context is made by asking.

    Raises:
        ConfigError: the GPU does not answer.
    """
    if device.type != "cuda":
        memory = ram()
        return DeviceMemory(
            device=str(device),
            total_bytes=memory["total_bytes"] or 0,
            free_bytes=memory["available_bytes"] or 0,
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(index)
        num_sms = torch.cuda.get_device_properties(index).multi_processor_count
    except RuntimeError as error:  # no memory for a context, or a card in exclusive use
        raise ConfigError(f"cuda:{index} cannot be used: {error}") from error
    return DeviceMemory(device=f"cuda:{index}", total_bytes=total, free_bytes=free, num_sms=num_sms)


def plan_memory(
    spec: ModelSpec,
    dtype: str,
    memory: DeviceMemory,
    scheduling: SchedulerConfig,
    *,
    max_model_len: int,
    block_size: int,
    kv_memory: int | None,
    utilization: float | None,
    fused: bool,
    graphs: bool,
    quantization: str | None = None,
    kv_dtype: str | None = None,
) -> MemoryBudget:
    """Divide a device's memory, before anything is allocated.

    Args:
        spec: the model.
        dtype: of weights and activations.
        memory: of the device, measured.
        scheduling: how large a step may get.
        max_model_len: tokens that a request may reach.
        block_size: tokens a block.
        kv_memory: bytes for K/V; None: what `utilization` leaves, on a CPU 1 GiB.
        utilization: share of a GPU's free memory; None: 0.9, where `kv_memory` is None.
        fused: the runner of our own kernels (`gpu_runner`) will run it.
        graphs: with CUDA graphs.
        quantization: of the weights.
        kv_dtype: of K/V; None: `dtype`.

    Raises:
        ConfigError: both `kv_memory` and `utilization`, or a utilization on a CPU.
        InsufficientMemoryError: it does not fit; names the figures and the options to change.
    """
    on_gpu = memory.device.startswith("cuda")
    if kv_memory is not None and utilization is not None:
        raise ConfigError(
            "--kv-memory and --gpu-memory-utilization both say what K/V gets: give one of them"
        )
    if utilization is not None and not on_gpu:
        raise ConfigError(
            "--gpu-memory-utilization divides a GPU's memory: on a CPU give --kv-memory"
        )
    limits = StepLimits(
        max_num_batched_tokens=scheduling.max_num_batched_tokens,
        max_num_seqs=scheduling.max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        max_steps_in_flight=scheduling.max_steps_in_flight,
    )
    if fused:
        footprint = gpu_footprint(
            spec, dtype, limits, num_sms=memory.num_sms, graphs=graphs and on_gpu
        )
    else:
        footprint = plain_footprint(spec, dtype, limits, quantization)
    layout = spec.kv_layout(kv_dtype or dtype, block_size)
    if kv_memory is None and on_gpu:
        return budget_from_free_memory(
            memory,
            footprint,
            layout,
            max_model_len=max_model_len,
            utilization=DEFAULT_UTILIZATION if utilization is None else utilization,
        )
    return budget_from_kv_memory(
        memory,
        footprint,
        layout,
        max_model_len=max_model_len,
        kv_memory=CPU_KV_MEMORY if kv_memory is None else kv_memory,
        must_fit=on_gpu,
    )
