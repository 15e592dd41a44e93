"""The workloads with texts that PageLab brings: small, and the same on every machine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from pagelab.workloads.lengths import between
from pagelab.workloads.prose import prose
from pagelab.workloads.request import Workload, WorkloadRequest

SEED_PROMPTS = (
    "Hello!",
    "How are you doing today? I hope everything is going well.",
    "Tell me a story about artificial intelligence and machine learning. " * 10,
    "Thanks!",
)


def seed_prompts() -> Workload:
    """The four prompts that the project began with, 50 new tokens each."""
    return Workload(
        "prompts",
        "Four prompts, three short and one long, 50 new tokens each",
        tuple(
            WorkloadRequest(id=f"prompt-{i}", prompt_text=text, max_tokens=50)
            for i, text in enumerate(SEED_PROMPTS)
        ),
    )


def mixed(seed: int = 0) -> Workload:
    """24 requests of very different lengths.

    Prompts are log-uniform from 4 to 160 tokens (about 1,000 in all), outputs log-uniform from
    10 to 44 (about 550 in all: the slowest method makes 10 to 15 a second). Each length is drawn
    from its own 24th of the distribution, so that the totals hardly depend on the seed.
    """
    rng = random.Random(f"mixed/{seed}")
    return _generated(
        "mixed",
        "{n} requests of very different lengths: prompts of {i0} to {i1} tokens, "
        "outputs of {o0} to {o1}",
        _log_uniform(rng, 24, 4, 160),
        _log_uniform(rng, 24, 10, 44),
        rng,
    )


def large(seed: int = 0) -> Workload:
    """32 requests with prompts uniform in 16..512 tokens and outputs uniform in 16..256."""
    rng = random.Random(f"large/{seed}")
    return _generated(
        "large",
        "{n} long requests: prompts of {i0} to {i1} tokens, outputs of {o0} to {o1}",
        [between(rng, 16, 512) for _ in range(32)],
        [between(rng, 16, 256) for _ in range(32)],
        rng,
    )


BUILDERS: dict[str, Callable[[int], Workload]] = {
    "prompts": lambda seed: seed_prompts(),
    "mixed": mixed,
    "large": large,
}


def _generated(
    name: str, title: str, inputs: list[int], outputs: list[int], rng: random.Random
) -> Workload:
    requests = tuple(
        WorkloadRequest(
            id=f"{name}-{i}",
            prompt_text=prose(rng, length),
            prompt_tokens=length,
            max_tokens=output,
        )
        for i, (length, output) in enumerate(zip(inputs, outputs, strict=True))
    )
    ranges = {"i0": min(inputs), "i1": max(inputs), "o0": min(outputs), "o1": max(outputs)}
    return Workload(name, title.format(n=len(requests), **ranges), requests)


def _log_uniform(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    """Log-uniform in low..high, one from each of `count` equally probable parts, shuffled."""
    ratio = math.log(high / low)
    values = [round(low * math.exp(ratio * (i + rng.random()) / count)) for i in range(count)]
    order = [(rng.random(), value) for value in values]
    return [value for _, value in sorted(order)]
