"""What a step costs outside the model: scheduling and memory work, by running requests.

    python benchmarks/core_cost.py [--running 4 64 256] [--steps 300] [--steps-in-flight 1]

The runner answers at once, so the time of a step is the core's own (and about 0.1 µs a sequence
of that runner's). Every request decodes; the pool holds them all; their lengths differ, so that
in each step a sixteenth of them needs a new block. Prints microseconds a step (median, 95th
percentile, worst) and the median by sequence.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import EngineCore
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.types import SampledToken, SamplingParams

TOKEN = SampledToken(1)
BLOCK_SIZE = 16


class NullRunner:
    """Samples the same token for everyone, in no time."""

    def submit(self, batch: Batch) -> StepResult:
        """Answer."""
        return StepResult(batch.step, {s.sequence_id: TOKEN for s in batch.sequences if s.samples})

    def collect(self, handle: StepResult) -> StepResult:
        """The answer."""
        return handle


def measure(
    running: int, prompt: int, steps: int, allocator: str, steps_in_flight: int
) -> list[float]:
    """Seconds of each step while `running` requests decode."""
    longest = prompt + BLOCK_SIZE - 1
    output = steps + steps_in_flight + 1  # so that all decode in every step that is measured
    length = longest + output
    if allocator == "contiguous-max":
        length = 1 << (length - 1).bit_length()
    core = EngineCore(
        NullRunner(),
        MemoryConfig(
            num_blocks=running * -(-length // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            max_model_len=length,
            allocator=allocator,
            watermark=0.0,
        ),
        SchedulerConfig(
            max_num_batched_tokens=running * longest,
            max_num_seqs=running,
            max_steps_in_flight=steps_in_flight,
        ),
        vocab_size=50_000,
    )
    for i in range(running):
        core.add_request(
            [(i * 7919 + j) % 50_000 for j in range(prompt + i % BLOCK_SIZE)],
            SamplingParams(max_tokens=output, temperature=0, ignore_eos=True),
        )
    core.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        core.step()
        seconds.append(time.perf_counter() - start)
    assert len(core.scheduler.running) == running, "they decode to the end"
    return seconds


def main() -> None:
    """Measure both allocators and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[4, 64, 256])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--steps-in-flight", type=int, default=1)
    args = parser.parse_args()
    print(
        f"{args.prompt} prompt tokens or a few more, {args.steps} steps, "
        f"{args.steps_in_flight} in flight, Python {platform.python_version()}; µs a step"
    )
    print("  allocator       running   median      p95    worst   a sequence")
    for allocator in ("paged", "contiguous-max"):
        for running in args.running:
            seconds = measure(running, args.prompt, args.steps, allocator, args.steps_in_flight)
            us = sorted(1e6 * s for s in seconds)
            median = statistics.median(us)
            print(
                f"  {allocator:15} {running:7} {median:8.0f} {us[int(0.95 * len(us))]:8.0f} "
                f"{us[-1]:8.0f} {median / running:12.2f}"
            )


if __name__ == "__main__":
    main()
