"""The time that a workload takes at the least by this machine's bandwidth and arithmetic.

::

    prompts   (each layer's weights once a token, attention, the head once a request) / rate
    decoding  (weights once a step  +  K/V once a generated token) / bandwidth
              or its own arithmetic / rate, where that takes longer (many requests on a CPU)

The two are added up: it is a reference, not a proof. Perfect overlap of the two could go below it,
and so could caches that hold the weights of a small model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pagelab.memory.layout import DTYPE_BYTES
from pagelab.models.parameters import count_parameters, dimensions_of
from pagelab.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a machine can do at most, as measured (`bench.ceilings`) or as stated.

    Attributes:
        bytes_per_s: memory bandwidth, reads and writes counted.
        flops_per_s: of a large matrix product in the model's dtype.
        how: what was measured, for people.
    """

    bytes_per_s: float
    flops_per_s: float
    how: str = "stated"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTime:
    """Seconds of a workload by its parts.

    Attributes:
        prompt_s: the prompts' arithmetic.
        weights_s: weights, read once a decode step.
        kv_s: K/V, read once a generated token.
        decode_arithmetic_s: what the generated tokens compute; beside reading unless it is more.
    """

    prompt_s: float
    weights_s: float
    kv_s: float
    decode_arithmetic_s: float

    @property
    def decode_s(self) -> float:
        """Of all decode steps."""
        return max(self.weights_s + self.kv_s, self.decode_arithmetic_s)

    @property
    def total_s(self) -> float:
        """The reference."""
        return self.prompt_s + self.decode_s

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self) | {"decode_s": self.decode_s, "total_s": self.total_s}


def reference_time(
    spec: ModelSpec,
    dtype: str,
    lengths: Sequence[tuple[int, int]],
    ceilings: Ceilings,
    *,
    concurrency: int | None = None,
    kv_dtype: str | None = None,
) -> ReferenceTime:
    """The reference of a workload.

    Args:
        spec: of the model.
        dtype: of weights.
        lengths: (tokens in, tokens out) of each request.
        ceilings: of the machine.
        concurrency: requests that run at the same time at most; None: all.
        kv_dtype: of K/V; None: `dtype`.
    """
    parameters = count_parameters(dimensions_of(spec))
    layers = parameters.sharded + parameters.kv
    head = spec.vocab_size * spec.hidden_size
    attention = 4 * spec.num_heads * spec.head_dim * spec.num_layers  # a query and key: q·k, p·v
    tokens_in = sum(prompt for prompt, _ in lengths)
    tokens_out = sum(output for _, output in lengths)
    prompt_pairs = sum(prompt * (prompt + 1) // 2 for prompt, _ in lengths)
    # the n-th generated token attends to the prompt and the n - 1 before it
    decode_pairs = sum(o * i + o * (o - 1) // 2 for i, o in lengths)
    at_once = min(concurrency or len(lengths), len(lengths))
    steps = max(max(output for _, output in lengths), -(-tokens_out // at_once))
    prompt_flops = 2 * layers * tokens_in + attention * prompt_pairs + 2 * head * len(lengths)
    decode_flops = 2 * (layers + head) * tokens_out + attention * decode_pairs
    weight_bytes = parameters.read_by_a_step(1, spec.num_kv_heads) * DTYPE_BYTES[dtype]
    kv_bytes = spec.kv_layout(kv_dtype or dtype, 1).bytes_per_token * decode_pairs
    return ReferenceTime(
        prompt_s=prompt_flops / ceilings.flops_per_s,
        weights_s=steps * weight_bytes / ceilings.bytes_per_s,
        kv_s=kv_bytes / ceilings.bytes_per_s,
        decode_arithmetic_s=decode_flops / ceilings.flops_per_s,
    )
