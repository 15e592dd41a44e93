"""What the parts of the extension's steps are counted to move and compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagelab.bench.native_parts import Sizes, count_parts, native_parts, row_bytes, sizes_of
from pagelab.bench.settings import BenchSettings, EngineChoice
from pagelab.bench.throughput import bench_throughput
from pagelab.bench.workloads import WorkloadChoice
from pagelab.engine.llm import LLM
from pagelab.execution.native_runner import Work
from pagelab.models.fetch import resolve
from pagelab.models.registry import load_spec
from pagelab.native.library import native
from pagelab.native.structures import BF16, F32, INT8, PARTS
from tests.support.engines import greedy
from tests.support.tiny_models import tiny_model

needs_it = pytest.mark.skipif(native() is None, reason="the extension does not run here")


def test_a_step_adds_its_rows_contexts_and_pairs_of_query_and_key() -> None:
    work = Work()
    work.add([1, 3], [10, 5], 2)  # the three see 3, 4 and 5 keys
    assert work == Work(1, 4, 15, 10 + 12, 2, 1)
    before = Work(*(getattr(work, name) for name in Work.__slots__))
    work.add([4], [4], 0)
    assert work.since(before) == Work(1, 4, 4, 10, 0, 0)


def test_a_row_of_a_product_takes_what_its_kind_says() -> None:
    assert row_bytes(40, F32) == 64 * 4
    assert row_bytes(40, BF16) == 64 * 2
    assert row_bytes(40, INT8) == 64 + 2 * 12


def test_the_parts_of_a_decode_step_by_hand() -> None:
    spec = load_spec(resolve(str(tiny_model("llama"))))
    h, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layers, inner, vocab = spec.num_layers, spec.intermediate_size, spec.vocab_size
    sizes = Sizes(layers=1000, table=vocab * 7, head=500, kind=F32, table_kind=F32, kv_head=10)
    work = Work()
    work.add([1, 1], [20, 30], 2)
    found = count_parts(spec, sizes, work)
    assert tuple(found) == PARTS
    weights = h * (q + 2 * kv) + q * h + 3 * h * inner
    assert found["linear"][1] == 2 * 2 * layers * weights
    rows = 4 * (h + q + h + inner) + 4 * (q + 2 * kv + 2 * inner) + 2 * 8 * h
    assert found["linear"][0] == 1000 + 2 * layers * rows
    keys = layers * 50 * 2 * spec.num_kv_heads * 10
    assert found["attention"] == (keys + 2 * layers * 16 * q, layers * 50 * 4 * q)
    assert found["head"] == (500 + 2 * 8 * h, 2 * 2 * h * vocab)
    assert found["embed"] == (2 * (7 + 4 * h + 4 * spec.head_dim), 0)
    assert found["activation"] == (2 * layers * 12 * inner, 2 * layers * 2 * inner)


@needs_it
def test_a_runner_counts_every_token_once_and_its_weights_as_packed() -> None:
    llm = LLM(str(tiny_model("llama")), device="cpu", kv_memory="4MiB", kv_cache_dtype="int8")
    runner = llm.core.runner
    llm.generate([[5] * 40], greedy(9))
    work = runner.work  # type: ignore[attr-defined]
    # a prompt of 40, then 8 steps: the last token is not computed
    assert work == Work(9, 48, 40 + sum(range(41, 49)), 820 + sum(range(41, 49)), 9, 9)
    sizes = sizes_of(runner)  # type: ignore[arg-type]
    assert sizes.kv_head == llm.spec.head_dim + 4
    assert sizes.layers + sizes.table == runner.decoder.weight_bytes  # type: ignore[attr-defined]
    seconds = dict.fromkeys(PARTS, 0.5) | {"head": 2.0}
    parts = native_parts(runner, seconds, work)  # type: ignore[arg-type]
    assert parts[0].name == "head"
    assert parts[0].bytes > 9 * sizes.head


@needs_it
def test_a_profile_has_the_parts_of_its_steps(tmp_path: Path) -> None:
    from contextlib import contextmanager

    from rich.console import Console

    from pagelab.bench.tables import print_record

    @contextmanager
    def stage(_: str, __: int):  # type: ignore[no-untyped-def]
        yield lambda _: None

    settings = BenchSettings(
        engine=EngineChoice(model=str(tiny_model("llama")), device="cpu", kv_memory="4MiB"),
        workload=WorkloadChoice(num_requests=3, input_len=20, output_len=12),
        warmup=0,
        repeats=1,
        limits=False,
        profile=tmp_path / "trace.json",
    )
    record = bench_throughput(settings, stage)
    parts = {part["name"]: part for part in record["profile"]["native"]}
    assert set(parts) == set(PARTS)
    steps = record["profile"]["steps"]
    spec = load_spec(resolve(str(tiny_model("llama"))))
    assert parts["head"]["operations"] == 2 * 3 * steps * spec.hidden_size * spec.vocab_size
    console = Console(record=True, width=120)
    print_record(record, console)
    assert "GFLOP/s" in console.export_text()
