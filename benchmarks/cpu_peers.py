"""PageLab and other engines on this CPU, in turn, on the same token ids.

    python benchmarks/cpu_peers.py --rounds 3 --engines pagelab-int8,pagelab-q4,openvino-gguf
    python benchmarks/cpu_peers.py --peer-python /tmp/peers/bin/python
    python benchmarks/cpu_peers.py --engines pagelab-int8,openvino-gguf --workloads w2 --busy 1

Every engine lives in a process of its own, loaded once; in each round every engine runs every
workload once, one engine after the other, so that whatever else the machine does meets all alike.
Engines that are not installed say so in their row. `--peer-python` names an interpreter with
`openvino-genai`, `llama-cpp-python` or `transformers`, where they should not share an environment
with PageLab. All of them run the default model (SmolLM2-135M-Instruct, a GGUF of Q4_1 and Q8_0),
greedy, end-of-sequence ignored, with as many threads as cores. `--openvino fp16=FOLDER,int8=FOLDER`
adds OpenVINO with the weights that `optimum-cli export openvino --weight-format fp16` wrote there.

`--busy N` runs every workload a second time right after, beside N programs that do nothing but take
a core each, and prints what is left of the rate. N programs beside a two-thread engine on two cores
leave it a fair share of 2 / (2 + N).

Workloads: w1, the experiment's lengths (2, 13, 130 and 2 in, 50 out); w2, 32 requests (3,695 in,
2,489 out); one, a single request (16 in, 100 out); prompt, 512 tokens in and 1 out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Requests = list[tuple[list[int], int]]
"""(token ids, tokens to generate) of each request."""

Rates = dict[tuple[str, str, bool], list[float]]
"""Tokens a second, one for each round, by engine, workload, and whether beside busy programs."""

_W2 = (
    "232,65 120,88 149,120 42,92 49,21 57,98 217,124 210,45 217,70 236,72 64,106 18,113 87,57 "
    "77,119 119,94 77,98 49,30 158,55 142,61 42,107 139,115 50,83 32,83 31,59 71,38 156,99 21,77 "
    "245,80 37,26 224,56 120,39 207,99"
)
WORKLOADS: dict[str, list[tuple[int, int]]] = {
    "w1": [(2, 50), (13, 50), (130, 50), (2, 50)],
    "w2": [tuple(map(int, pair.split(","))) for pair in _W2.split()],  # type: ignore[misc]
    "one": [(16, 100)],
    "prompt": [(512, 1)],
}

Generate = Callable[[Requests], int]
"""Runs requests together; returns the tokens generated."""


def requests_of(workload: str) -> Requests:
    """Seeded token ids of a workload's lengths."""
    draw = random.Random(workload)
    return [
        ([draw.randrange(1000, 40000) for _ in range(tokens_in)], tokens_out)
        for tokens_in, tokens_out in WORKLOADS[workload]
    ]


def pagelab(**options: Any) -> Callable[[str, int], Generate]:
    """Ours."""

    def load(_: str, threads: int) -> Generate:
        from pagelab.engine.llm import LLM
        from pagelab.types import SamplingParams

        llm = LLM(device="cpu", prefix_caching=False, progress=False, threads=threads, **options)

        def generate(requests: Requests) -> int:
            params = [
                SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
                for _, count in requests
            ]
            outputs = llm.generate([ids for ids, _ in requests], params, progress=False)
            return sum(len(output.token_ids) for output in outputs)

        return generate

    return load


def openvino(model: str, threads: int) -> Generate:
    """OpenVINO GenAI's continuous batching, of a GGUF or of a folder of exported weights."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.max_num_batched_tokens = 512
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )

    def config(count: int) -> Any:
        return openvino_genai.GenerationConfig(
            max_new_tokens=count, ignore_eos=True, do_sample=False
        )

    def generate(requests: Requests) -> int:
        tensors = [openvino.Tensor(np.array([ids], np.int64)) for ids, _ in requests]
        results = pipeline.generate(tensors, [config(count) for _, count in requests])
        return sum(len(result.m_generation_ids[0]) for result in results)

    return generate


def llama_cpp(model: str, threads: int) -> Generate:
    """llama.cpp, one request after the other."""
    from llama_cpp import Llama

    llama = Llama(model, n_threads=threads, n_threads_batch=threads, n_ctx=1024, verbose=False)

    def generate(requests: Requests) -> int:
        total = 0
        for ids, count in requests:
            llama.reset()
            for number, _ in enumerate(llama.generate(ids, temp=0.0), start=1):
                if number == count:
                    break
            total += count
        return total

    return generate


def transformers(model: str, threads: int) -> Generate:
    """`generate()` of transformers in bfloat16, a padded batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    path = Path(model)
    network = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    ).eval()

    def generate(requests: Requests) -> int:
        longest = max(len(ids) for ids, _ in requests)
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in requests])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in requests])
        most = max(count for _, count in requests)
        with torch.inference_mode():
            network.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=most,
                min_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
            )
        return sum(count for _, count in requests)

    return generate


ENGINES: dict[str, Callable[[str, int], Generate]] = {
    "pagelab-float32": pagelab(dtype="float32"),
    "pagelab-bfloat16": pagelab(dtype="bfloat16"),
    "pagelab-int8": pagelab(quantization="int8"),
    "pagelab-q4": pagelab(quantization="q4"),
    "pagelab-torch-float32": pagelab(dtype="float32", attention="cpu"),
    "pagelab-torch-bfloat16": pagelab(dtype="bfloat16", attention="cpu"),
    "openvino-gguf": openvino,
    "llama.cpp": llama_cpp,
    "transformers": transformers,
}


def serve(name: str, model: str, threads: int) -> None:
    """A process's life: load, say so, then run a workload for each line of standard input."""
    started = time.perf_counter()
    try:
        generate = ENGINES.get(name, openvino)(model, threads)
    except Exception as error:  # whatever a peer's loading raises is its row's remark
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
        return
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        requests = requests_of(line.strip())
        started = time.perf_counter()
        tokens = generate(requests)
        print(json.dumps({"s": time.perf_counter() - started, "tokens": tokens}), flush=True)


class Engine:
    """A process that serves one engine."""

    def __init__(self, name: str, python: str, model: str, threads: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name, "--model", model, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.first = self._read()

    def run(self, workload: str) -> dict[str, Any]:
        """Seconds and tokens, or an error."""
        assert self._process.stdin is not None
        self._process.stdin.write(workload + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        return {"error": "its process ended"}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description="PageLab and peers")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--model", help="The GGUF; without it the default model's.")
    parser.add_argument("--openvino", default="", metavar="NAME=FOLDER,…", help="Exported weights.")
    parser.add_argument("--busy", type=int, default=0, help="Programs that take a core each.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, options.threads)
        return
    if options.model is None:
        from pagelab.models.fetch import resolve

        options.model = str(resolve(None).path)
    exported = dict(pair.split("=", 1) for pair in options.openvino.split(",") if pair)
    engines = [
        Engine(
            name,
            sys.executable if name.startswith("pagelab") else options.peer_python,
            options.model,
            options.threads,
        )
        for name in options.engines.split(",")
    ]
    engines += [
        Engine(f"openvino-{name}", options.peer_python, folder, options.threads)
        for name, folder in exported.items()
    ]
    workloads = options.workloads.split(",")
    rates = measure(engines, workloads, options.rounds, options.busy, options.json)
    show(engines, workloads, options.rounds, rates)
    for engine in engines:
        engine.close()


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many other programs, each of which would like a core of its own."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(
    engines: Sequence[Engine],
    workloads: Sequence[str],
    rounds: int,
    programs: int,
    path: Path | None,
) -> Rates:
    """All engines in turn, round by round."""
    rates: Rates = {}
    for number in range(rounds + 1):  # the first is not counted
        for workload in workloads:
            for engine in engines:
                for beside in (False, True) if programs else (False,):
                    if "error" in engine.first:
                        continue
                    with busy(programs if beside else 0):
                        result = engine.run(workload)
                    if "error" in result:
                        engine.first = result
                    elif number > 0:
                        # a prompt's rate is that of its own tokens
                        tokens = 512 if workload == "prompt" else result["tokens"]
                        found = rates.setdefault((engine.name, workload, beside), [])
                        found.append(tokens / result["s"])
            if path is not None:  # what is there so far
                path.write_text(
                    json.dumps(
                        [
                            {"engine": engine, "workload": workload, "busy": beside, "rates": found}
                            for (engine, workload, beside), found in rates.items()
                        ],
                        indent=2,
                    )
                    + "\n"
                )
    return rates


def show(engines: Sequence[Engine], workloads: Sequence[str], rounds: int, rates: Rates) -> None:
    """The table: a row an engine, with the remark of one that is not here."""
    compared = any(beside for _, _, beside in rates)
    print(f"tok/s, best (median) of {rounds} rounds" + (", and what is left beside" * compared))
    print(f"{'engine':24}" + "".join(f"{workload:>25}" for workload in workloads))
    for engine in engines:
        cells = []
        for workload in workloads:
            quiet = rates.get((engine.name, workload, False), [])
            beside = rates.get((engine.name, workload, True), [])
            cell = f"{max(quiet):8.1f} ({statistics.median(quiet):6.1f})" if quiet else ""
            if quiet and beside:
                cell += f" {statistics.median(beside) / statistics.median(quiet):5.0%}"
            cells.append(cell.rjust(25))
        remark = engine.first.get("error")
        print(f"{engine.name:24}" + ("".join(cells) if remark is None else f"  not here: {remark}"))


if __name__ == "__main__":
    main()
