"""What the live page map costs a step: with nobody looking, and with somebody looking.

    python benchmarks/page_map_cost.py [--sequences 256] [--steps 4000]

A real scheduler and KV manager, a runner that answers at once; so this is host time a step, all of
it. Steps with and without a watch alternate in slices of a fifth of a second of a model whose step
takes `--step-ms`, with a look after each; five looks a second are set against that second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.block_watch import BlockWatch
from pagelab.engine.core import EngineCore
from pagelab.engine.messages import StepStats, frame
from pagelab.engine.worker import LOOK_SHARE
from pagelab.memory.ledger import take_ledger
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.types import SampledToken, SamplingParams

LOOKS_A_SECOND = 5
TURNS = 5  # slices with a watch, then as many without


class _AtOnce:
    """A runner that takes no time."""

    def submit(self, batch: Batch) -> Batch:
        return batch

    def collect(self, handle: Batch) -> StepResult:
        return StepResult(
            handle.step, {part.sequence_id: SampledToken(1) for part in handle.sequences}
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--step-ms", type=float, default=1.0, help="of a fast model, on a GPU")
    options = parser.parse_args()
    blocks = options.sequences * (options.steps // 16 + 8)
    length = options.steps + 200
    slice_ = max(1, round(1000 / LOOKS_A_SECOND / options.step_ms))
    core = EngineCore(
        _AtOnce(),
        MemoryConfig(num_blocks=blocks, max_model_len=length, watermark=0.0),
        SchedulerConfig(max_num_batched_tokens=100_000, max_num_seqs=options.sequences),
        vocab_size=100,
    )
    params = SamplingParams(max_tokens=options.steps + 50, ignore_eos=True)
    for i in range(options.sequences):
        core.add_request([i % 100] * 20, params)
    core.step()
    times: dict[bool, list[float]] = {False: [], True: []}
    looks: list[float] = []
    watch: BlockWatch | None = None
    for turn in range(options.steps // slice_):
        if turn % TURNS == 0:  # somebody comes, or goes
            if watch is not None:
                watch.close()
            watch = BlockWatch(core) if watch is None else None
        if watch is not None:
            started = time.perf_counter()
            frame(watch.look(_stats(core)))
            if turn % TURNS > 0:  # the first one tells everything
                looks.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(slice_):
            core.step()
        times[watch is not None].append((time.perf_counter() - started) / slice_)
    off, on, look = (statistics.median(x) * 1e3 for x in (times[False], times[True], looks))
    model_s = options.step_ms / 1e3
    pause_ms = max(1e3 / LOOKS_A_SECOND, LOOK_SHARE * look)
    share = max(0.0, on - off) / 1e3 / model_s + look / pause_ms
    print(f"{options.sequences} running sequences, {blocks:,} blocks")
    print(f"host time a step: {off:.3f} ms unwatched, {on:.3f} ms watched")
    print(f"one look (all changes of {slice_} steps, pickled): {look:.2f} ms")
    print(
        f"steps of {options.step_ms:g} ms, {1e3 / pause_ms:.1f} looks a second: "
        f"{100 * max(0.0, share):.2f} % of the time"
    )
    return 0


def _stats(core: EngineCore) -> StepStats:
    return StepStats(0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, take_ledger(core.kv, None), 0, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
