"""The soak of the GPU's runner in miniature: its assertions hold, and its figures are real."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's runner needs Triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_soak.py"


def test_a_soak_preempts_cancels_and_ends_with_nothing_held(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    requests = 2000 if torch.cuda.is_available() else 20
    runpy.run_path(str(SCRIPT))["main"](["--requests", str(requests), "--json", str(out)])
    figures = json.loads(out.read_text())["figures"]
    assert figures["requests"] == requests
    assert figures["preemptions"] > 0
    assert figures["cancelled"] > 0
    assert figures["compared"] > 0
    assert figures["different_tokens_seen"] > figures["compared"], "constant answers prove little"
