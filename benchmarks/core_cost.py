"""What a step costs outside the model: scheduling and memory work, by running requests.

    python benchmarks/core_cost.py [--running 256] [--steps 300]

The runner answers at once, so the time of a step is the core's own. Every request decodes; the
pool holds them all. Prints milliseconds a step: median, 95th percentile, and worst.
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


class NullRunner:
    """Samples the same token for everyone, in no time."""

    def submit(self, batch: Batch) -> StepResult:
        """Answer."""
        return StepResult(batch.step, {s.sequence_id: TOKEN for s in batch.sequences if s.samples})

    def collect(self, handle: StepResult) -> StepResult:
        """The answer."""
        return handle


def measure(running: int, prompt: int, steps: int, allocator: str) -> list[float]:
    """Seconds of each step while `running` requests decode."""
    length = prompt + steps + 2
    if allocator == "contiguous-max":
        length = 1 << (length - 1).bit_length()
    core = EngineCore(
        NullRunner(),
        MemoryConfig(
            num_blocks=running * -(-length // 16),
            max_model_len=length,
            allocator=allocator,
            watermark=0.0,
        ),
        SchedulerConfig(max_num_batched_tokens=running * prompt, max_num_seqs=running),
        vocab_size=50_000,
    )
    for i in range(running):
        core.add_request(
            [(i * 7919 + j) % 50_000 for j in range(prompt)],
            SamplingParams(max_tokens=steps + 1, temperature=0, ignore_eos=True),
        )
    core.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        core.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure both allocators and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    print(
        f"{args.running} running requests, {args.prompt} prompt tokens, {args.steps} steps, "
        f"Python {platform.python_version()}; ms a step"
    )
    for allocator in ("paged", "contiguous-max"):
        ms = sorted(1000 * s for s in measure(args.running, args.prompt, args.steps, allocator))
        print(
            f"  {allocator:15} median {statistics.median(ms):.2f}   "
            f"p95 {ms[int(0.95 * len(ms))]:.2f}   worst {ms[-1]:.2f}"
        )


if __name__ == "__main__":
    main()
