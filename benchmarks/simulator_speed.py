"""How many requests the simulator serves in a minute of one core, and in how much memory.

    python benchmarks/simulator_speed.py azure_conv_2023.csv
    python benchmarks/simulator_speed.py uniform:in=8..64,out=1..8 --requests 100000,1000000

The paged allocator with Llama-3.1-8B's budget on 80 GB, steps at an H100's limits. CPU seconds are
this process's own; the peak of its memory (RSS) is what the kernel says, so give several numbers of
requests in rising order to see that it does not grow with them.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.models.shape_source import built_in_shape
from pagelab.sim.planner import PlanSettings, plan_memory
from pagelab.sim.prices import card_roofline
from pagelab.sim.stream import simulate_stream
from pagelab.workloads import ShapeOptions, open_shapes


def measure(spec: str, requests: int | None, rate: str | None, prefix_caching: bool) -> None:
    """Simulate one stream and print a line."""
    shape = built_in_shape("llama-3.1-8b")
    plan = plan_memory(shape, PlanSettings(gpu_memory=80 << 30, max_model_len=32_768))
    options = ShapeOptions(
        num_requests=requests, rate=rate, max_model_len=plan.max_model_len, too_long="clip"
    )
    started, cpu = time.perf_counter(), time.process_time()
    found = simulate_stream(
        open_shapes(spec, options=options),
        MemoryConfig(
            num_blocks=plan.num_pages,
            max_model_len=plan.max_model_len,
            prefix_caching=prefix_caching,
        ),
        SchedulerConfig(max_num_batched_tokens=2048),
        cost=card_roofline("h100", shape, "bfloat16"),
        vocab_size=shape.dimensions.vocab_size,
    )
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mib = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    print(
        f"{found.requests:>9,} requests, {found.output_tokens:>10,} tokens out, "
        f"{found.steps:>9,} steps, {found.mean_running:6.1f} at once: {wall:7.1f} s "
        f"({cpu:.1f} CPU), {60 * found.requests / cpu:>9,.0f} requests a minute, "
        f"peak {peak_mib:.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Print a line for each number of requests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", help="a trace file or a generator, as --workload takes it")
    parser.add_argument("--requests", default="", help="numbers with commas; default: all, once")
    parser.add_argument("--rate", help="as --rate of compare; default: the trace's own")
    parser.add_argument("--prefix-cache", action="store_true", help="for traces with hash ids")
    args = parser.parse_args()
    print(f"{args.workload}, Python {platform.python_version()}, {platform.machine()}")
    for number in args.requests.split(","):
        requests = int(number) if number else None
        measure(args.workload, requests, args.rate, args.prefix_cache)


if __name__ == "__main__":
    main()
