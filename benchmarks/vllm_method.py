"""The method `vllm` by itself, as the experiment runs it, on random weights of a 135M shape.

    python benchmarks/vllm_method.py [dtype …]     default: bfloat16

For machines that have vLLM and a GPU and no model: two loads, one that fits and one that does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pagelab.lab.methods import Variant
from pagelab.lab.process import log_tail, run_method
from pagelab.lab.protocol import Job
from pagelab.workloads import Workload, WorkloadRequest

FOLDER = Path("/tmp/random-135m")


def make_model() -> None:
    """Write the model once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(FOLDER)


def workload(name: str, count: int, prompt: int, output: int, every_s: float = 0.0) -> Workload:
    """Requests of about the same lengths, one every so often."""
    return Workload(
        name,
        name,
        tuple(
            WorkloadRequest(
                id=f"{name}-{i}",
                prompt_tokens=prompt + i % 7,
                max_tokens=output + i % 5,
                prompt_token_ids=tuple((131 * i + 17 * k) % 49000 for k in range(prompt + i % 7)),
                arrival_s=every_s * i,
            )
            for i in range(count)
        ),
    )


def main() -> None:
    """Print what came of each dtype."""
    if not FOLDER.exists():
        make_model()
    roomy, tight = workload("roomy", 16, 100, 64, 0.02), workload("tight", 64, 200, 400)
    for dtype in sys.argv[1:] or ["bfloat16"]:
        job = Job(
            method="vllm",
            allocator=None,
            model=str(FOLDER),
            dtype=dtype,
            kv_memory=512 << 20 if dtype == "float32" else 256 << 20,
            block_size=16,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            watermark=0.01,
            threads=8,
            seed=0,
            temperature=0.0,
            warm_up=workload("warm", 2, 8, 4),
            workloads=(roomy, tight),
        )
        log = Path(f"/tmp/vllm-{dtype}.log")
        run = run_method(
            job,
            Variant(job.method, None, "vllm", "paged"),
            0,
            log_path=log,
            on_event=lambda event: None,
            silence_timeout_s=540,
        )
        print(dtype, run["status"], run["reason"], run["startup"], run["kv"], sep="\n  ")
        print("  peak RSS, device:", run["peak_rss_bytes"], run["peak_device_bytes"])
        for done in run["workloads"]:
            steps, requests = done["steps"], done["requests"]
            print(" ", done["name"], round(done["output_tokens_per_s"]), "tok/s", done["ledger"])
            print(
                "    steps",
                len(steps["t"]),
                "preemptions",
                len(done["preemptions"]),
                "recomputed",
                sum(r["recomputed_tokens"] for r in requests),
                "prefix",
                done["prefix_queries"],
                done["prefix_hits"],
            )
            first = requests[0]
            print(
                "    first request:",
                first["arrival_s"],
                first["first_scheduled_s"],
                first["token_times_s"][:3],
                first["output_token_ids"][:8],
            )
            late = [r["id"] for r in requests if r["first_scheduled_s"] > r["first_token_s"]]
            print("    scheduled after their first token (must be none):", late)
        if run["status"] != "ok":
            print(log_tail(log, 60))


if __name__ == "__main__":
    main()
