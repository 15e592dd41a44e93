"""Compiles the linear layer's kernel for an H100, without one, and prints what Triton made of it.

Run as a program, without Triton's interpreter: `python -m tests.support.compiled_linear CASE`, with
a case as JSON: a tiling's fields, `k`, `gated` and `norm`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

KINDS = {
    **dict.fromkeys(("x", "w", "x_tiles", "w_tiles", "bias", "residual", "out"), "*bf16"),
    **dict.fromkeys(("partial", "row_sums", "peaks", "stats"), "*fp32"),
    **dict.fromkeys(("arrived", "best"), "*i32"),
    **dict.fromkeys(("M", "N"), "i32"),
    "eps": "fp32",
}


def layout(case: dict[str, Any]) -> str:
    """The kernel in Triton's own form for GPUs, with buffers, copies and waits."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pagelab.kernels.linear import _linear

    kernel: Any = _linear
    constants = {
        "K": case["k"],
        "BLOCK_M": case["block_m"],
        "BLOCK_N": case["block_n"],
        "BLOCK_K": case["block_k"],
        "SPLIT": case["split"],
        "NORM": case["norm"],
        "ACT": "silu" if case["gated"] else "none",
        "GATED": case["gated"],
        "BIAS": False,
        "ADD": False,
        "STATS": 0,
        "STAT_WIDTH": case["k"] // 16,
        "STAT_BLOCKS": case["k"] // 32,
        "STAGES": case["stages"],
        "PREFETCH": case["prefetch"],
        "RESIDENT": case["resident"],
        "DESCRIPTORS": case["descriptors"],
        "PEAKS": False,
        "PRECISION": "tf32",
        "PDL": True,
    }
    names = kernel.arg_names
    signature = {name: KINDS.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name == "N" or signature[name].startswith("*")
    }
    if case["descriptors"]:
        for name, rows in (("x_tiles", case["block_m"]), ("w_tiles", case["block_n"])):
            signature[name] = f"tensordesc<bf16[{rows}, {case['block_k']}]>"
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": case["warps"], "launch_pdl": True}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return str(compiled.asm["ttgir"])


if __name__ == "__main__":
    sys.stdout.write(layout(json.loads(sys.argv[1])))
