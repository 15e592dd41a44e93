"""Many requests through a small model on the GPU, with everything that can go wrong going on.

    python benchmarks/gpu_soak.py [--requests 20000] [--json FILE]

A pool that is too small (preemptions), cancellations at any moment, shared prefixes, parallel
samples, greedy and random sampling mixed, steps in flight. Asserted at every step: the ledger adds
up to the pool. At an interval: the invariants of scheduler and memory. At the end: nothing is
held, the device's memory has not grown since half-time, and the greedy tokens of a random sample
are those of the request alone. Two tokens may be so close that the order of a sum decides; such a
place is counted as a tie if the two differ by less than `TIE`, and ends that comparison.

Without a GPU it runs in Triton's interpreter, for which `--requests 20` is enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pagelab.engine.llm import LLM
    from pagelab.scheduling.sequence import Request
    from pagelab.types import SamplingParams

TIE = {"float32": 1e-4, "bfloat16": 0.06, "float16": 0.01}  # of log probabilities
GROWTH = 16 << 20  # of device memory after half-time: a graph or two may still be captured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run."""

    requests: int = 20_000
    seed: int = 0
    dtype: str = "float32"
    device: str = "cuda"
    vocab: int = 512
    hidden: int = 256
    layers: int = 4
    kv_heads: int = 2  # with two query heads each
    max_num_seqs: int = 128
    block_size: int = 16
    pool_tokens: int = 6_144
    longest_prompt: int = 160
    longest_output: int = 96
    steps_in_flight: int = 3
    cancelled: float = 0.1
    latest_cancel: int = 60  # steps after it was added
    sample: int = 200
    check_every: int = 50


@dataclasses.dataclass(slots=True)
class Asked:
    """One request of the soak."""

    prompt: list[int]
    params: SamplingParams
    cancel_at: int | None  # steps after it was added
    request: Request | None = None


def write_config(folder: Path, settings: Settings) -> None:
    """A model's config.json: a small Qwen3."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": settings.vocab,
        "hidden_size": settings.hidden,
        "intermediate_size": 3 * settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 2 * settings.kv_heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.hidden // 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, settings: Settings, **options: Any) -> LLM:
    """The model with random weights, the same ones every time."""
    from pagelab.engine.llm import LLM

    return LLM(
        str(folder),
        device=settings.device,
        dtype=settings.dtype,
        attention="triton",
        random_weights=True,
        block_size=settings.block_size,
        max_model_len=settings.longest_prompt + settings.longest_output,
        progress=False,
        **options,
    )


def draw(settings: Settings, rng: random.Random) -> list[Asked]:
    """The requests: half of them greedy, some with a common beginning, some with three samples."""
    from pagelab.types import SamplingParams

    beginnings = [[rng.randrange(settings.vocab) for _ in range(64)] for _ in range(8)]
    asked = []
    for i in range(settings.requests):
        length = rng.randint(1, settings.longest_prompt)
        prompt = [rng.randrange(settings.vocab) for _ in range(length)]
        if rng.random() < 0.3:
            prompt = (rng.choice(beginnings) + prompt)[:length]
        kind = rng.random()
        params = SamplingParams(
            max_tokens=rng.randint(1, settings.longest_output),
            temperature=0.0 if kind < 0.5 else 0.8,
            top_p=0.9 if kind > 0.8 else 1.0,
            seed=i,
            n=3 if rng.random() < 0.05 else 1,
            ignore_eos=True,
        )
        cancel_at = (
            rng.randint(0, settings.latest_cancel) if rng.random() < settings.cancelled else None
        )
        asked.append(Asked(prompt, params, cancel_at))
    return asked


class Soak:
    """A run; `figures` says afterwards what happened."""

    def __init__(self, settings: Settings, llm: LLM) -> None:
        self.settings, self.llm = settings, llm
        self.counts: Counter[str] = Counter(steps=0, preemptions=0, cancelled=0, output_tokens=0)
        self._cancels: dict[int, list[Request]] = {}
        llm.core.on_step = self._on_step

    def run(self, asked: Sequence[Asked]) -> dict[str, Any]:
        """Serve all requests, two full batches of them at a time."""
        core, settings, waiting = self.llm.core, self.settings, list(reversed(asked))
        memory: list[int] = []
        began = time.perf_counter()
        while waiting or core.has_unfinished_requests:
            outstanding = len(core.scheduler.running) + len(core.scheduler.waiting)
            while waiting and outstanding < 2 * settings.max_num_seqs:
                self._add(waiting.pop())
                outstanding += 1
            for request in self._cancels.pop(self.counts["steps"], ()):
                self.counts["cancelled"] += not request.finished
                core.cancel(request.id)
            core.step()
            self.counts["steps"] += 1
            if self.counts["steps"] % settings.check_every == 0:
                core.scheduler.check_invariants()
            if not memory and len(waiting) <= len(asked) // 2:
                memory.append(self._memory())
        seconds = time.perf_counter() - began
        core.scheduler.check_invariants()
        assert core.kv.pool.num_held == 0, "blocks are held by nobody"
        memory.append(self._memory())
        grown = memory[1] - memory[0]
        assert grown <= GROWTH, f"the device's memory grew by {grown} bytes since half-time"
        runner: Any = core.runner
        tokens = self.counts["output_tokens"]
        return {
            "requests": len(asked),
            **self.counts,
            "seconds": round(seconds, 1),
            "output_tokens_per_s": round(tokens / seconds),
            "graphs": len(runner.graphs),
            "device_bytes_at_half_time": memory[0],
            "device_bytes_at_end": memory[1],
        }

    def _add(self, asked: Asked) -> None:
        asked.request = self.llm.core.add_request(asked.prompt, asked.params)
        if asked.cancel_at is not None:
            at = self.counts["steps"] + asked.cancel_at
            self._cancels.setdefault(at, []).append(asked.request)

    def _on_step(self, record: Any) -> None:
        from pagelab.memory.ledger import take_ledger

        entry = take_ledger(self.llm.core.kv, record.waiting_blocks)
        config = self.llm.core.kv.config
        assert entry.pool == config.num_blocks * config.block_size, entry
        assert min(entry) >= 0, entry
        self.counts["preemptions"] += len(record.preempted)
        self.counts["tokens_computed"] += record.num_tokens
        for sequence, token, reason in record.events:
            assert sequence.error is None, sequence.error
            self.counts["output_tokens"] += token is not None
            self.counts["sequences_ended"] += reason is not None

    def _memory(self) -> int:
        if self.llm.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()


def compare_alone(settings: Settings, folder: Path, asked: Sequence[Asked]) -> dict[str, int]:
    """Greedy requests again, each alone and without a prefix cache."""
    chosen = [a for a in asked if a.params.greedy and a.request is not None and a.cancel_at is None]
    random.Random(settings.seed).shuffle(chosen)
    alone = load(folder, settings, kv_memory="64MiB", max_num_seqs=4, prefix_caching=False)
    counts = Counter(compared=0, compared_tokens=0, ties=0)
    kinds: set[int] = set()
    for a in chosen[: settings.sample]:
        assert a.request is not None
        params = dataclasses.replace(a.params, n=1, logprobs=settings.vocab)
        (output,) = alone.generate([a.prompt], params, progress=False)
        kinds.update(output.token_ids)
        counts["compared"] += 1
        for sequence in a.request.sequences:  # of a greedy request they are all the same
            counts["ties"] += _differ(
                sequence.output_token_ids, output.token_ids, output.outputs[0].logprobs, settings
            )
            counts["compared_tokens"] += len(output.token_ids)
    counts["different_tokens_seen"] = len(kinds)
    return dict(counts)


def _differ(got: Sequence[int], want: Sequence[int], logprobs: Any, settings: Settings) -> bool:
    """Whether they part at a tie. They must not part anywhere else."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            values = dict(logprobs[i].top)
            gap = values[b] - values[a]
            assert gap < TIE[settings.dtype], f"token {i} is {a}, alone {b}, {gap} better"
            return True
    return False


def machine(device: str) -> dict[str, str]:
    """Date, card and versions."""
    import triton

    import pagelab

    on_gpu = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": torch.cuda.get_device_name() if on_gpu else "none (Triton's interpreter)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "pagelab": pagelab.__version__,
    }


def soak(settings: Settings) -> dict[str, Any]:
    """Run it all."""
    rng = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, settings)
        bytes_per_token = 2 * settings.layers * settings.kv_heads * (settings.hidden // 4)
        bytes_per_token *= torch.finfo(getattr(torch, settings.dtype)).bits // 8
        llm = load(
            folder,
            settings,
            kv_memory=settings.pool_tokens * bytes_per_token,
            watermark=0.0,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=512 if settings.device == "cuda" else 16,
            max_steps_in_flight=settings.steps_in_flight,
        )
        asked = draw(settings, rng)
        figures = Soak(settings, llm).run(asked)
        del llm
        figures |= compare_alone(settings, folder, asked)
    return {
        "machine": machine(settings.device),
        "settings": dataclasses.asdict(settings),
        "figures": figures,
    }


def arguments(given: Sequence[str] | None) -> tuple[Settings, Path | None]:
    """The command line; without a GPU everything is made small."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(TIE), default="float32")
    parser.add_argument("--steps-in-flight", type=int, default=3)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    settings = Settings(seed=args.seed, dtype=args.dtype, steps_in_flight=args.steps_in_flight)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        settings = dataclasses.replace(
            settings,
            device="cpu",
            requests=20,
            vocab=64,
            hidden=64,
            layers=1,
            kv_heads=1,
            max_num_seqs=4,
            block_size=4,
            pool_tokens=28,
            longest_prompt=8,
            longest_output=8,
            sample=3,
            cancelled=0.3,
            latest_cancel=6,
            check_every=5,
        )
    asked = {"requests": args.requests, "sample": args.sample}
    changed = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(settings, **changed), args.json


def main(given: Sequence[str] | None = None) -> None:
    """Print the figures, and write them where asked."""
    settings, path = arguments(given)
    result = soak(settings)
    for part in result.values():
        for key, value in part.items():
            print(f"{key:28}{value:>24,}" if isinstance(value, int) else f"{key:28}{value!s:>24}")
        print()
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
