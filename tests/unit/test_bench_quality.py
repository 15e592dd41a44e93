"""What lower precision costs: the figures, and that they come from the engine's own kernels."""

from __future__ import annotations

import math

import pytest
import torch

from pagelab.bench.quality import bench_quality, measure_quality, quality_text, windows
from pagelab.errors import ConfigError
from pagelab.native.library import native
from tests.support.tiny_models import tiny_model

VOCAB = 8


def test_the_figures_of_distributions_that_are_known() -> None:
    """Uniform against one that prefers token 0 with a probability of a half."""
    ids = [0, 0, 0, 0]
    exact = torch.full((4, VOCAB), 1 / VOCAB).log()
    odds = torch.full((4, VOCAB), 0.5 / (VOCAB - 1))
    odds[:, 0] = 0.5
    found = measure_quality("x", lambda _: odds.log() + 3.0, [exact], [ids])
    assert found.perplexity == pytest.approx(2.0)
    assert found.top1_agreement == 1.0
    want = sum(math.log(1 / VOCAB / p) / VOCAB for p in odds[0].tolist())
    assert found.divergence == pytest.approx(want, rel=1e-5)


def test_a_text_is_cut_into_windows_that_predict_something() -> None:
    assert windows(list(range(9)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows([1, 2], 4) == [[1, 2]]
    assert len(quality_text()) > 5000


@pytest.mark.skipif(native() is None, reason="the extension does not run here")
def test_float32_equals_itself_and_lower_precision_is_near() -> None:
    ids = [(7 * i * i + i) % 250 for i in range(120)]
    rows = list(
        bench_quality(
            str(tiny_model("llama")), ["bfloat16", "int8", "q4"], window=50, token_ids=ids
        )
    )
    exact, bfloat16, int8, q4 = rows
    assert exact.top1_agreement == 1.0
    assert abs(exact.divergence) < 1e-6
    assert bfloat16.top1_agreement > 0.9
    assert bfloat16.divergence < int8.divergence < q4.divergence < 1.0
    kept = bench_quality(
        str(tiny_model("llama")), ["float32"], window=50, token_ids=ids, kv_cache_dtype="int8"
    )
    plain, small = kept
    assert plain == exact
    assert small.precision == "float32, int8 K/V"
    assert 0 < small.divergence < int8.divergence, "K/V costs less than weights"
    with pytest.raises(ConfigError, match="no precision 'int2'"):
        next(bench_quality(None, ["int2"]))
