"""How exact the GPU's runner is, as tables for docs/benchmarks.

    python -m benchmarks.gpu_exactness [--json FILE]        (from the repository's root)

First, in float32: the greedy tokens of every tiny model that equal the CPU's, however they are
computed; anything below all of them is a fault. Then in lower precision, for tiny models and for
random ones of true shapes: log probabilities against float32, ours and transformers' own. 1 if a
gate is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tests.support.exactness import (
    PROMPTS,
    VARIANTS,
    Precision,
    equal_tokens,
    precision,
    save_true_shape,
    variant_engine,
)
from tests.support.tiny_models import TINY, tiny_model

import pagelab

KL_LIMIT, LARGEST_LIMIT = 1.5, 2.0  # times transformers' own, as in tests/gpu


def token_rows() -> list[dict[str, Any]]:
    """Tokens that equal the CPU's, for every model and way to run."""
    rows = []
    for variant in VARIANTS:
        row: dict[str, Any] = {"variant": variant}
        for name in TINY:
            row[name] = equal_tokens(variant_engine(name, variant, "cuda"), name)
        rows.append(row)
        cells = "".join(f"{f'{a}/{b}':>12}" for a, b in (row[name] for name in TINY))
        print(f"{variant:36}{cells}", flush=True)
    return rows


def precision_row(label: str, dtype: str, found: Precision) -> dict[str, Any]:
    """Print and return what one model's log probabilities are like."""
    ours, theirs = found.ours, found.theirs
    good = (
        ours.mean_kl < KL_LIMIT * theirs.mean_kl + 1e-7
        and ours.largest < LARGEST_LIMIT * theirs.largest + 1e-4
    )
    print(
        f"{label:14}{dtype:10}{found.positions:>10}{ours.mean_kl:>12.2e}{theirs.mean_kl:>14.2e}"
        f"{ours.largest:>12.4f}{theirs.largest:>14.4f}{'' if good else '   MISSED'}",
        flush=True,
    )
    return {
        "model": label,
        "dtype": dtype,
        "positions": found.positions,
        "mean_kl": ours.mean_kl,
        "mean_kl_transformers": theirs.mean_kl,
        "largest": ours.largest,
        "largest_transformers": theirs.largest,
        "good": good,
    }


def precision_rows() -> list[dict[str, Any]]:
    """Lower precision: tiny models, then true shapes."""
    rows = []
    for name in TINY:
        for dtype in ("bfloat16", "float16"):
            found = precision(tiny_model(name), PROMPTS, dtype, "cuda")
            rows.append(precision_row(name, dtype, found))
    for name in ("gpt2", "qwen3-0.6b"):
        with tempfile.TemporaryDirectory() as folder:
            save_true_shape(name, Path(folder))
            found = precision(Path(folder), PROMPTS, "bfloat16", "cuda")
            rows.append(precision_row(f"{name} (true)", "bfloat16", found))
    return rows


def machine() -> dict[str, str]:
    """Date, card and versions."""
    import transformers
    import triton

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "pagelab": pagelab.__version__,
    }


def main() -> int:
    """Print the tables; 1 if a gate was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here")
        return 1
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\ngreedy tokens that equal the CPU's, float32\n{'':36}", end="")
    print("".join(f"{name:>12}" for name in TINY))
    tokens = token_rows()
    print("\nlog probabilities against float32: mean KL divergence, largest difference")
    print(f"{'':24}{'positions':>10}{'KL':>12}{'transformers':>14}{'most':>12}{'transformers':>14}")
    lower = precision_rows()
    if args.json is not None:
        result = {"machine": about, "tokens": tokens, "precision": lower}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    all_equal = all(right == total for row in tokens for right, total in (row[n] for n in TINY))
    return 0 if all_equal and all(row["good"] for row in lower) else 1


if __name__ == "__main__":
    sys.exit(main())
