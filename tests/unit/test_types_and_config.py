"""Values that cannot work are refused, with the name of the knob."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest

from pagelab import errors
from pagelab.config import MemoryConfig, SchedulerConfig, format_bytes, parse_bytes
from pagelab.errors import ConfigError, InsufficientMemoryError, PageLabError, RequestError
from pagelab.memory.layout import KVLayout
from pagelab.types import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 2),
        ("n", 0),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("logprobs", -1),
    ],
)
def test_sampling_parameters_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("2k", 2048), (7, 7), ("1TB", 1 << 40)],
)
def test_sizes_are_read_in_binary_units(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1.2.3", "5 pounds", 0, -3])
def test_sizes_that_are_none_are_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


def test_sizes_are_written_with_their_unit() -> None:
    assert [format_bytes(n) for n in (5, 2048, 256 << 20, 3 << 29, 5 << 40)] == [
        "5 B",
        "2.0 KiB",
        "256.0 MiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"num_blocks": 1, "block_size": 0},
        {"num_blocks": 1, "watermark": 1.0},
        {"num_blocks": 1, "max_model_len": 0},
    ],
)
def test_memory_settings_that_cannot_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        MemoryConfig(**options)  # type: ignore[arg-type]


def test_scheduler_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        SchedulerConfig(max_num_batched_tokens=0)


def test_gpt2_takes_the_bytes_and_blocks_that_design_md_says() -> None:
    layout = KVLayout(12, 12, 64, "bfloat16", 16)
    assert layout.bytes_per_token == 36_864
    assert layout.num_blocks(int(18.1044 * (1 << 30))) * 16 == 527_328  # vLLM 0.9.2's figure


def test_a_budget_below_one_block_names_the_knob() -> None:
    with pytest.raises(InsufficientMemoryError, match="raise --kv-memory"):
        KVLayout(12, 12, 64, "float32", 16).num_blocks(1000)


def test_every_error_is_a_pagelab_error() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) > 8
    assert all(issubclass(kind, PageLabError) for kind in kinds)


def test_importing_the_package_does_not_import_torch_and_is_quick() -> None:
    code = (
        "import pagelab, sys; assert 'torch' not in sys.modules, 'torch'; pagelab.SamplingParams()"
    )
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        best = min(best, time.perf_counter() - start)
    # 0.3 s beyond the interpreter's own start on an idle machine; doubled for a shared one
    assert best < 0.6
