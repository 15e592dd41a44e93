"""What changed logits cost: a step's sampling with and without, and a grammar's masks.

    python benchmarks/sampling_cost.py [--rows 32] [--threads 1]

Rows of random logits, as many as the default model has tokens; 500 tokens of prompt and 300 of
output where penalties count them. The grammar is a JSON schema of 20 fields, followed through a
document by the default model's tokenizer. Prints medians of 15, and for masks the median, the 95th
percentile and the worst.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pagelab.engine.guided import GrammarCompiler
from pagelab.execution.sampler import sample
from pagelab.models.fetch import resolve
from pagelab.models.registry import load_spec, load_tokenizer
from pagelab.scheduling.batch import LogitsInputs, ScheduledSequence
from pagelab.types import GuidedDecoding, RequestId, SamplingParams, SequenceId

FIELDS = [f"field_{i}" for i in range(20)]
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": ["string", "integer", "null"]} for name in FIELDS},
    "required": FIELDS,
    "additionalProperties": False,
}


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_sampling(rows: int, vocab: int) -> None:
    """Print a step's sampling, by what its rows ask for."""
    logits = torch.randn(rows, vocab)
    history = LogitsInputs(tuple(range(500)), tuple(range(100, 400)))
    greedy = SamplingParams(temperature=0)
    penalties = SamplingParams(temperature=0, repetition_penalty=1.1, presence_penalty=1.0)
    biased = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(100), 1.0))
    usual: tuple[SamplingParams, LogitsInputs | None] = (greedy, None)
    one, mask = (penalties, history), LogitsInputs(allowed=b"\xff" * (-(-vocab // 8)))
    kinds: dict[str, list[tuple[SamplingParams, LogitsInputs | None]]] = {
        "nobody asks": [usual] * rows,
        "one row with penalties": [*[usual] * (rows - 1), one],
        "all with penalties": [one] * rows,
        "all with a bias of 100 tokens": [(biased, LogitsInputs())] * rows,
        "all with a mask": [(greedy, mask)] * rows,
    }
    for name, asked in kinds.items():
        parts = [
            ScheduledSequence(
                SequenceId(RequestId(str(i)), 0), 0, 1, (0,), (), True, (0, 0), params, (), inputs
            )
            for i, (params, inputs) in enumerate(asked)
        ]
        work = functools.partial(sample, logits, parts)
        median = statistics.median(seconds(work) for _ in range(15))
        print(f"  {name:32} {1e3 * median:7.2f} ms")


def measure_grammar() -> None:
    """Print what a grammar costs at its beginning and with each token."""
    source = resolve(None)
    spec, tokenizer = load_spec(source), load_tokenizer(source)
    start = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, spec.vocab_size, spec.eos_token_ids)
    built = time.perf_counter()
    constraint = compiler.compile(GuidedDecoding(json_schema=SCHEMA))
    compiled = time.perf_counter()
    again = seconds(lambda: compiler.compile(GuidedDecoding(json_schema=SCHEMA)))
    document = {name: i if i % 2 else f"some text here {i}" for i, name in enumerate(FIELDS)}
    tokens = tokenizer.encode(json.dumps(document), add_special_tokens=False)
    us = sorted(1e6 * seconds(functools.partial(constraint.advance, t)) for t in tokens)
    assert constraint.ended
    print(f"  the tokenizer, once              {1e3 * (built - start):7.2f} ms")
    print(f"  the schema                       {1e3 * (compiled - built):7.2f} ms")
    print(f"  the schema, again                {1e3 * again:7.2f} ms")
    worst = f"95 % below {us[int(0.95 * len(us))]:.0f}, worst {us[-1]:.0f}, of {len(us)}"
    print(f"  a token and the next mask        {statistics.median(us):7.0f} µs, {worst}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"sampling {args.rows} rows of {args.vocab} logits, {args.threads} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    measure_sampling(args.rows, args.vocab)
    print("a JSON schema of 20 fields, followed through a document")
    measure_grammar()


if __name__ == "__main__":
    main()
