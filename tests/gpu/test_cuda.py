"""On an NVIDIA GPU: the same tokens as on the CPU, in float32, whatever the allocator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagelab.engine.llm import LLM
from tests.support.engines import greedy
from tests.support.tiny_models import TINY, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPTS = [[1, 2, 3], [5], list(range(40)), [9, 8, 7, 6]]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("allocator", ["paged", "contiguous-max"])
def test_tokens_equal_the_cpus(name: str, allocator: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder: Path = tiny_model(name)
    tokens = []
    for device in ("cpu", "cuda"):
        llm = LLM(
            str(folder),
            device=device,
            dtype="float32",
            kv_memory="8MiB",
            max_model_len=128,
            allocator=allocator,
        )
        tokens.append([output.token_ids for output in llm.generate(PROMPTS, greedy(48))])
    assert tokens[0] == tokens[1]
