"""K/V in 8 bits: attention against the oracle on the same values, and what the engine stores."""

from __future__ import annotations

import ctypes
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from pagelab.attention.base import AttentionBackend, Span
from pagelab.attention.native import NativeAttention
from pagelab.attention.reference import ReferenceAttention
from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError
from pagelab.memory.layout import KVLayout
from pagelab.native.library import instruction_sets, native
from pagelab.native.packed import KINDS, PackedLinear, Threads
from pagelab.types import BlockId
from tests.support.engines import greedy
from tests.support.int8_cache import pack, unpack
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(native() is None, reason="the extension does not run here")

PROMPTS = [list(range(5, 5 + n)) for n in (1, 3, 40, 90)]
LENGTHS = [(1, 1), (1, 17), (1, 64), (1, 65), (1, 300), (1, 700), (7, 7), (5, 70), (130, 300)]
"""(queries, keys) of each sequence."""


def tables(block_size: int) -> tuple[list[Span], int]:
    """Sequences of `LENGTHS` in scattered blocks; and how many blocks there are."""
    draw = random.Random(block_size)
    count = sum(-(-keys // block_size) for _, keys in LENGTHS) + 3
    free = [BlockId(block) for block in range(count)]
    draw.shuffle(free)
    spans, row = [], 0
    for queries, keys in LENGTHS:
        blocks = tuple(free.pop() for _ in range(-(-keys // block_size)))
        spans.append(Span(row, queries, keys, blocks))
        row += queries
    return spans, count


def attend(
    backend: AttentionBackend, q: torch.Tensor, cache: torch.Tensor, spans: list[Span]
) -> torch.Tensor:
    return backend.attend(q, q, q, cache, backend.plan(spans, cache), 0.2)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("block_size", [1, 6, 8, 16, 48, 128])
@pytest.mark.parametrize(
    ("heads", "dim"), [((9, 3), 64), ((4, 4), 16), ((8, 1), 80), ((10, 2), 128)]
)
def test_attention_equals_the_oracle_on_the_values_that_are_stored(
    heads: tuple[int, int], dim: int, block_size: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and weights of keys take 15 bits, so that only the stored values differ from K/V."""
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    torch.manual_seed(dim)
    spans, count = tables(block_size)
    packed = pack(torch.randn(2, heads[1], count, block_size, dim))
    q = torch.randn(sum(queries for queries, _ in LENGTHS), heads[0], dim)
    got = attend(NativeAttention(2), q, packed, spans)
    want = attend(ReferenceAttention(), q, unpack(packed), spans)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for span in spans:  # alone, to the bit
        rows = slice(span.row, span.row + span.num_queries)
        alone = Span(0, span.num_queries, span.num_keys, span.block_ids)
        assert torch.equal(attend(NativeAttention(1), q[rows], packed, [alone]), got[rows])


def engine(**options: Any) -> LLM:
    defaults: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "kv_memory": "4MiB",
        "device": "cpu",
        "kv_cache_dtype": "int8",
    }
    return LLM(**(defaults | options))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("block_size", [3, 4, 16])
def test_what_a_step_stores_is_its_keys_and_values_rounded(
    block_size: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first layer nothing has been read from the cache yet: both engines have the same."""
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    stored = []
    for kind in ("auto", "int8"):
        llm = engine(kv_cache_dtype=kind, block_size=block_size, prefix_caching=False)
        llm.generate([PROMPTS[3]], greedy(1))
        cache = llm.core.runner.cache  # type: ignore[attr-defined]
        stored.append(cache.layers[0][:, :, : len(PROMPTS[3]) // block_size])
    exact, packed = stored
    got = unpack(packed)
    steps = exact.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(exact.any(dim=-1).all())
    assert float(((got - exact).abs() / steps).max()) < 0.502
    torch.testing.assert_close(pack(exact), packed, rtol=0, atol=1)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"quantization": "q4"}, {}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_gets_the_same_tokens_alone_and_among_31_others(
    options: dict[str, Any], dtype: str
) -> None:
    options = options | {"dtype": dtype, "prefix_caching": False, "kv_memory": "16MiB"}
    prompts = [[(7 * i * j + j) % 250 for j in range(3 * i + 1)] for i in range(32)]
    together = engine(**options).generate(prompts, greedy(16))
    for i in (0, 1, 5, 23, 31):
        (alone,) = engine(**options).generate([prompts[i]], greedy(16))
        assert alone.token_ids == together[i].token_ids


def test_a_prefix_is_reused_with_its_scales_and_parallel_samples_share_it() -> None:
    llm = engine(check_invariants=True, block_size=8)
    want = llm.generate([PROMPTS[3]], greedy(12))[0]
    again = llm.generate([PROMPTS[3]], greedy(12))[0]
    assert again.metrics.num_cached_tokens == 88
    # its last 2 tokens alone are another path of attention, the same numbers
    assert again.token_ids == want.token_ids
    several = llm.generate([PROMPTS[3]], replace(greedy(12), n=3))[0]  # copies on write
    assert [output.token_ids for output in several.outputs] == [want.token_ids] * 3


def test_twice_the_tokens_of_bfloat16_fit_into_the_same_memory() -> None:
    """But for the scales: 4 bytes beside the 64 of a head (an eighth more with tiny heads)."""
    layouts = [KVLayout(30, 3, 64, dtype, 16) for dtype in ("bfloat16", "int8")]
    plain, small = (layout.num_blocks(1 << 30) for layout in layouts)
    assert small / plain == pytest.approx(128 / 68, rel=1e-3)
    llm = engine(quantization="int8")
    layout = llm.spec.kv_layout("int8", 16)
    assert llm.core.kv.config.num_blocks == (4 << 20) // layout.bytes_per_block
    cache = llm.core.runner.cache  # type: ignore[attr-defined]
    held = sum(layer.nbytes for layer in cache.layers)
    assert held == cache.num_blocks * layout.bytes_per_block == llm.memory_budget.kv_bytes


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention": "cpu"}, "here it is cpu"),
        ({"dtype": "float16"}, "it has float32 and bfloat16, not float16"),
        ({"kv_cache_dtype": "fp8"}, "no --kv-cache-dtype 'fp8': choose one of auto, int8"),
    ],
)
def test_where_it_does_not_work_the_error_names_the_option(
    options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype.*{why}" if "no -" not in why else why):
        engine(**options)


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("quantization", ["int8", "q4"])
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00], ids=["nan", "inf"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_a_request_that_is_not_finite_fails_alone(
    isa: str, bits: int, quantization: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group's scale of one token's embedding is planted: whoever uses the token has them."""
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    llm = engine(
        model=str(tiny_model("llama3")),  # its head is not the embedding
        quantization=quantization,
        kv_cache_dtype=kv,
        check_invariants=True,
        max_num_batched_tokens=16,
        block_size=8,
    )
    prompt = PROMPTS[2]
    want = llm.generate([prompt], greedy(8))[0].token_ids
    table = llm.core.runner.decoder.embedding.fields  # type: ignore[attr-defined]
    panel = table.data + 200 // 32 * table.panel_bytes  # Q8: 1024 bytes, then 32 halves
    ctypes.c_uint16.from_address(panel + 1024 + 200 % 32 * 2).value = bits
    poisoned = [*prompt[:20], 200, *prompt[20:]]
    for prompts in ([poisoned, prompt], [prompt[::-1], poisoned, prompt]):
        outputs = llm.generate(prompts, greedy(8))
        assert "not finite" in (outputs[-2].outputs[0].error or "")
        assert outputs[-1].token_ids == want


@pytest.mark.parametrize("position", [0, 17, 40, 63])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["int8", "q8", "q4"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_one_input_that_is_not_finite_makes_its_row_so_and_no_other(
    isa: str, kind: str, bad: float, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    found = native()
    assert found is not None
    threads = Threads(found, 2)
    torch.manual_seed(0)
    packed = PackedLinear(threads, KINDS[kind], torch.randn(40, 64))
    x = torch.randn(7, 64)
    want = packed(threads, x)
    x[3, position] = bad
    got = packed(threads, x)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(got[others], want[others])
    assert not bool(got[3].isfinite().any())
