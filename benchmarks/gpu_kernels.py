"""Each kernel alone on a GPU: checked against torch, then timed against what the card can do.

    python benchmarks/gpu_kernels.py [linear decode prefill ceilings]

Calls are captured in a CUDA graph over inputs that rotate (so that nothing stays in the caches),
and the median of several replays is taken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from pagelab.kernels.decode_items import DecodePlan
from pagelab.kernels.launch import device_of
from pagelab.kernels.linear import FoldedNorm, SplitWorkspace, Tiling, linear
from pagelab.kernels.paged_decode import DecodeTiles, decode_attention
from pagelab.kernels.paged_prefill import prefill_attention, queries_per_tile
from pagelab.kernels.row_stats import RowStats
from pagelab.kernels.step_state import Embeddings, SequenceRows, begin_decode
from pagelab.kernels.tilings import tiling_for

CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def graph_us(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds of one call, over a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return float(statistics.median(times[2:]))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def ceilings() -> None:
    """Print what the card copies and multiplies."""
    source = torch.randn(1 << 30, device=CUDA, dtype=BF16)
    target = torch.empty_like(source)
    us = graph_us([partial(target.copy_, source)] * 4)
    print(f"copy {4 * source.numel() / us / 1e6:.2f} TB/s")
    x, w = (torch.randn(8192, 8192, device=CUDA, dtype=BF16) for _ in range(2))
    us = graph_us([partial(torch.mm, x, w)] * 10)
    print(f"matrix product {2 * 8192**3 / us / 1e6:.0f} TFLOP/s")


# model: (N, K, gated, norm)
LINEARS = {
    "gpt2 qkv": (2304, 768, False, True),
    "gpt2 o": (768, 768, False, False),
    "gpt2 up": (3072, 768, False, True),
    "gpt2 down": (768, 3072, False, False),
    "qwen qkv": (4096, 1024, False, True),
    "qwen o": (1024, 2048, False, False),
    "qwen gateup": (3072, 1024, True, True),
    "qwen down": (1024, 3072, False, False),
    "llama qkv": (6144, 4096, False, True),
    "llama o": (4096, 4096, False, False),
    "llama gateup": (14336, 4096, True, True),
    "llama down": (4096, 14336, False, False),
}


def linears(names: list[str]) -> None:
    device = device_of(CUDA)
    workspace = SplitWorkspace(1 << 24, 1 << 16, CUDA)
    for name in names:
        n, k, gated, with_norm = LINEARS[name]
        total = n * (2 if gated else 1)
        copies = max(2, min(40, -(-300_000_000 // (total * k * 2))))
        weights = [torch.randn(total, k, device=CUDA, dtype=BF16) * k**-0.5 for _ in range(copies)]
        norm = FoldedNorm(1e-5, None) if with_norm else None
        for rows, others in OTHERS.items():
            x = torch.randn(rows, k, device=CUDA, dtype=BF16)
            out = torch.empty(rows, n, device=CUDA, dtype=BF16)
            full = torch.empty(rows, total, device=CUDA, dtype=BF16)
            floor = total * k * 2 / 3.0e6
            blas = graph_us([partial(torch.mm, x, w.t(), out=full) for w in weights])
            h = F.rms_norm(x.float(), (k,), None, 1e-5) if with_norm else x
            stats = RowStats(rows, k, layer=False, device=CUDA) if with_norm else None
            if stats is not None:
                stats.values[:, 0, 0] = x.float().pow(2).sum(1)
            y = h.double() @ weights[0].double().t()
            if gated:
                y = F.silu(y[:, ::2]) * y[:, 1::2]
            results = []
            own = tiling_for(rows, n, k, gated=gated, norm=with_norm)
            for tiling in others if own is None else [own, *others]:
                if with_norm and tiling.split > 1:
                    continue
                if k // tiling.split % tiling.block_k or (gated and tiling.split > 1):
                    continue
                t = replace(tiling, prefetch=min(k // tiling.split, tiling.prefetch))

                def call(w: torch.Tensor, t: Tiling = t) -> None:
                    linear(
                        x,
                        w,
                        out,
                        t,
                        workspace,
                        device,
                        norm=norm,
                        activation="silu" if gated else "none",
                        gated=gated,
                        stats=stats,
                    )

                try:
                    out.fill_(float("nan"))
                    call(weights[0])
                    error = difference(out, y)
                    us = graph_us([partial(call, w) for w in weights])
                except Exception as e:
                    print("FAIL", name, rows, t, str(e)[:200])
                    continue
                mark = "" if error < 1e-2 else f" WRONG {error:.1e}"
                label = (
                    f"{t.block_m}x{t.block_n}x{t.block_k}/{t.split} s{t.stages} w{t.warps}"
                    f" p{t.prefetch}{' own' if tiling == own else ''}{mark}"
                )
                results.append((us, label))
            results.sort()
            best = "; ".join(f"{us:.1f} [{label}]" for us, label in results[:3])
            worst = f"{results[-1][0]:.1f}" if results else "-"
            print(
                f"{name:12} M={rows:3} floor {floor:5.1f} blas {blas:5.1f} | {best} | worst {worst}"
            )


def decode_case(
    lengths: list[int], heads: int, kv_heads: int, dim: int, layers: int, block: int = 16
) -> tuple[SequenceRows, list[torch.Tensor], torch.Tensor]:
    per_seq = -(-max(lengths) // block)
    used = sum(-(-n // block) for n in lengths)
    rows = len(lengths) + 1
    tables = torch.zeros(rows, per_seq, dtype=torch.int32)
    order = torch.randperm(used, dtype=torch.int32) + 1
    at = 0
    for i, n in enumerate(lengths):
        count = -(-n // block)
        tables[i, :count] = order[at : at + count]
        at += count
    computed = torch.tensor([n - 1 for n in lengths] + [0], dtype=torch.int32)
    zeros = torch.zeros(rows, dtype=torch.int32, device=CUDA)
    state = SequenceRows(zeros, computed.to(CUDA), zeros.clone(), tables.to(CUDA))
    caches = [
        torch.randn(2, kv_heads, used + 1, block, dim, device=CUDA, dtype=BF16)
        for _ in range(layers)
    ]
    return state, caches, torch.arange(len(lengths), dtype=torch.int32, device=CUDA)


def decodes() -> None:
    device = device_of(CUDA)
    torch.manual_seed(0)
    mixed = torch.randint(100, 1500, (256,)).tolist()
    cases = {
        "64x2048 H32/8 D128": ([2048] * 64, 32, 8, 128, 2),
        "64x2048 H16/8 D128": ([2048] * 64, 16, 8, 128, 2),
        "1x32768 H32/8 D128": ([32768], 32, 8, 128, 6),
        "256 mixed H16/8 D128": (mixed, 16, 8, 128, 2),
        "64x256 H12/12 D64": ([256] * 64, 12, 12, 64, 10),
        "256 mixed H12/12 D64": (mixed, 12, 12, 64, 2),
        "4x100 H12/12 D64": ([100] * 4, 12, 12, 64, 20),
    }
    for name, (lengths, heads, kv_heads, dim, layers) in cases.items():
        state, caches, rows = decode_case(lengths, heads, kv_heads, dim, layers)
        seqs = len(lengths)
        q = torch.randn(seqs, heads, dim, device=CUDA, dtype=BF16)
        out = torch.empty_like(q)
        hidden = 64
        table = torch.randn(10, hidden, device=CUDA, dtype=BF16)
        freq = torch.rand(dim // 2, device=CUDA)
        x = torch.empty(seqs, hidden, device=CUDA, dtype=BF16)
        cos, sin = (torch.empty(seqs, dim // 2, device=CUDA) for _ in range(2))
        bytes_ = sum(lengths) * 2 * kv_heads * dim * 2
        results = []
        for target in (device.num_sms // kv_heads, device.num_sms * 2 // kv_heads):
            for block_n, stages, warps in (
                (64, 2, 4),
                (64, 3, 4),
                (64, 4, 4),
                (128, 2, 4),
                (128, 3, 4),
                (128, 3, 8),
                (32, 4, 2),
                (64, 3, 2),
            ):
                plan = DecodePlan(256, heads, kv_heads, dim, target, CUDA)
                begin_decode(rows, state, Embeddings(table, None, freq), x, cos, sin, plan, device)

                def call(cache: torch.Tensor) -> None:
                    decode_attention(
                        q,
                        out,
                        cache,
                        state.block_tables,
                        plan,
                        dim**-0.5,
                        device,
                        num_seqs=seqs,
                        tiles=DecodeTiles(block_n, stages, warps, 0),
                    )

                try:
                    out.fill_(float("nan"))
                    call(caches[0])
                    i = seqs - 1
                    n = lengths[i]
                    kv = caches[0][:, :, state.block_tables[i, : -(-n // 16)].long()]
                    kv = kv.flatten(2, 3)[:, :, :n].double().repeat_interleave(heads // kv_heads, 1)
                    s = torch.einsum("hd,hnd->hn", q[i].double(), kv[0]) * dim**-0.5
                    error = difference(out[i], torch.einsum("hn,hnd->hd", s.softmax(-1), kv[1]))
                    if not bool(out.isfinite().all()):
                        error = 9.0
                    us = graph_us([partial(call, c) for c in caches * 2])
                except Exception as e:
                    print("FAIL", name, block_n, stages, warps, str(e)[:200])
                    continue
                mark = "" if error < 1e-2 else f" WRONG {error:.1e}"
                results.append((us, f"N{block_n} s{stages} w{warps} t{target}{mark}"))
        results.sort()
        best = "; ".join(f"{us:.1f} [{label}]" for us, label in results[:4])
        print(f"{name:22} floor {bytes_ / 3.0e6:6.1f} | {best} | worst {results[-1]}")


def prefills() -> None:
    device = device_of(CUDA)
    for name, n, heads, kv_heads, dim in (
        ("8192 H32/8 D128", 8192, 32, 8, 128),
        ("8192 H12/12 D64", 8192, 12, 12, 64),
        ("1024 H16/8 D128", 1024, 16, 8, 128),
    ):
        state, caches, _ = decode_case([n], heads, kv_heads, dim, 1)
        q = torch.randn(n, heads, dim, device=CUDA, dtype=BF16)
        out = torch.empty_like(q)
        flops = 2 * n * n * heads * dim
        kv = caches[0][:, :, state.block_tables[0].long()].flatten(2, 3)
        qq = q.transpose(0, 1)[None]
        expected = F.scaled_dot_product_attention(
            qq, kv[0][None], kv[1][None], is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        others = []
        kk = kv.repeat_interleave(heads // kv_heads, 1)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    us = graph_us(
                        [
                            lambda: F.scaled_dot_product_attention(
                                qq, kk[0][None], kk[1][None], is_causal=True
                            )
                        ]
                        * 3
                    )
                others.append(f"{backend.name} {flops / us / 1e6:.0f}")
            except Exception as e:
                others.append(f"{backend.name} {str(e)[:60]}")
        results = []
        for bm, bn, stages, warps in (
            (128, 64, 2, 8),
            (128, 64, 3, 8),
            (128, 64, 4, 8),
            (128, 128, 2, 8),
            (128, 128, 3, 8),
            (64, 64, 3, 4),
            (128, 64, 3, 4),
            (128, 32, 4, 8),
        ):
            per = queries_per_tile(heads, kv_heads, bm)
            tiles = torch.tensor(
                [[0, s, min(per, n - s), s] for s in range(0, n, per)], dtype=torch.int32
            ).to(CUDA)
            count = torch.tensor([len(tiles)], dtype=torch.int32, device=CUDA)

            def call() -> None:
                prefill_attention(
                    q,
                    out,
                    caches[0],
                    state.block_tables,
                    tiles,
                    count,
                    dim**-0.5,
                    device,
                    block_m=bm,
                    block_n=bn,
                    num_stages=stages,
                    num_warps=warps,
                )

            try:
                out.fill_(float("nan"))
                call()
                error = difference(out, expected)
                us = graph_us([call] * 3)
            except Exception as e:
                print("FAIL", name, bm, bn, stages, warps, str(e)[:200])
                continue
            mark = "" if error < 1e-2 else f" WRONG {error:.1e}"
            results.append((flops / us / 1e6, f"{bm}x{bn} s{stages} w{warps}{mark}"))
        results.sort(reverse=True)
        best = "; ".join(f"{rate:.0f} [{label}]" for rate, label in results[:4])
        print(f"prefill {name:18} TFLOP/s (causal) {' '.join(others)} | {best}")


WIDE = [
    Tiling(64, 64, 64, stages=6, prefetch=512, descriptors=True),
    Tiling(64, 32, 128, stages=5, prefetch=1024, descriptors=True),
    Tiling(128, 64, 64, stages=5, prefetch=512, descriptors=True),
    Tiling(128, 128, 64, stages=4, warps=8, descriptors=True),
]
OTHERS = {
    4: [
        Tiling(16, 16, 256, stages=3, prefetch=1024),
        Tiling(16, 32, 128, split=4, prefetch=768),
        Tiling(16, 32, 256, warps=8, resident=True),
        Tiling(16, 64, 128, prefetch=512, descriptors=True),
    ],
    64: [
        Tiling(64, 16, 256, prefetch=1024, descriptors=True),
        Tiling(64, 32, 128, stages=5, prefetch=1024, descriptors=True),
        Tiling(64, 32, 128, split=4, prefetch=768),
        Tiling(64, 64, 128, prefetch=512, descriptors=True),
    ],
    128: WIDE,
    256: WIDE,
}
"""Rows: tilings beside the one of the table."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["ceilings", "decode", "prefill", "linear"])
    parts = parser.parse_args().parts
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    with torch.inference_mode():
        if "ceilings" in parts:
            ceilings()
        if "decode" in parts:
            decodes()
        if "prefill" in parts:
            prefills()
        if "linear" in parts:
            linears(list(LINEARS))
