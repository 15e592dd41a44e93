"""Decode steps at long contexts with K/V in the model's dtype and in int8, in turn.

    python benchmarks/kv_precision.py --requests 16 --context 1500 --quantization int8 --rounds 5

Two engines in one process, the default model, prefix caching off. Each round gives every engine
the same requests, one engine after the other, and times the steps in which all of them generate;
prompts are timed apart. `attention` is the extension's own time of that part.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from pagelab.engine.llm import LLM
from pagelab.types import SamplingParams


def measure(llm: LLM, requests: int, context: int, tokens: int) -> tuple[float, float, float]:
    """Seconds of the prompts; milliseconds of a decode step, and of its attention."""
    draw = random.Random(context)
    # the first requests generate while the last ones' prompts are computed: they must not end then
    meanwhile = 2 * requests * context // llm.core.scheduler.config.max_num_batched_tokens
    params = SamplingParams(max_tokens=meanwhile + tokens + 2, temperature=0, ignore_eos=True)
    for _ in range(requests):
        llm.core.add_request([draw.randrange(1000, 40000) for _ in range(context)], params)
    started = time.perf_counter()
    began: set[object] = set()
    while len(began) < requests:  # until each has its first token
        began.update(event.sequence.id for event in llm.core.step())
    prompts = time.perf_counter() - started
    steps, attention = [], []
    for _ in range(tokens):
        before = llm.core.runner.seconds_by_part()["attention"]  # type: ignore[attr-defined]
        started = time.perf_counter()
        assert len(llm.core.step()) == requests, "all of them generate"
        steps.append(time.perf_counter() - started)
        after = llm.core.runner.seconds_by_part()["attention"]  # type: ignore[attr-defined]
        attention.append(after - before)
    while llm.core.has_unfinished_requests:
        llm.core.step()
    return prompts, 1e3 * statistics.median(steps), 1e3 * statistics.median(attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=["int8", "q4"])
    options = parser.parse_args()
    engines = {
        name: LLM(
            device="cpu",
            dtype=options.dtype,
            quantization=options.quantization,
            kv_cache_dtype=name,
            kv_memory="2GiB",
            prefix_caching=False,
            max_num_seqs=options.requests,
            progress=False,
        )
        for name in ("auto", "int8")
    }
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in engines}
    for _ in range(options.rounds):
        for name, llm in engines.items():
            found = measure(llm, options.requests, options.context, options.tokens)
            figures[name].append(found)
            print(
                f"{llm.kv_dtype:>9}  prompts {found[0]:.2f} s  step {found[1]:.2f} ms  "
                f"attention {found[2]:.2f} ms",
                flush=True,
            )
    for name, llm in engines.items():
        prompts, steps, attention = zip(*figures[name], strict=True)
        print(
            f"{llm.kv_dtype:>9}  medians: prompts {statistics.median(prompts):.2f} s, "
            f"step {statistics.median(steps):.2f} ms ({min(steps):.2f} to {max(steps):.2f}), "
            f"attention {statistics.median(attention):.2f} ms, "
            f"{llm.core.kv.config.num_blocks:,} blocks in 2 GiB"
        )


if __name__ == "__main__":
    main()
