"""Out of memory: said with the option to change, and only the step's own requests end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pagelab.engine.llm import LLM
from pagelab.errors import InsufficientMemoryError
from pagelab.execution.kv_cache import KVCache
from pagelab.execution.oom import STEP, out_of_memory
from pagelab.memory.layout import KVLayout
from pagelab.models.decoder import Decoder
from tests.support.engines import greedy
from tests.support.tiny_models import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_TEXT),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_every_kind_names_what_was_done_and_the_knob(error: Exception) -> None:
    with (
        pytest.raises(InsufficientMemoryError, match=r"no memory left on cpu in a test.*: turn it"),
        out_of_memory("in a test", CPU, "turn it"),
    ):
        raise error


def test_the_figures_are_what_was_asked_for_and_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 29, 79 << 30))
    text = r"on cuda:0 here, asking for 2.50 GiB \(512.0 MiB of 79.0 GiB are free\): lower"
    with pytest.raises(InsufficientMemoryError, match=text), out_of_memory("here", CUDA, STEP):
        raise torch.OutOfMemoryError(CUDA_TEXT)


def test_a_graph_capture_that_ran_out_is_found_behind_the_error_of_its_end() -> None:
    def capture() -> None:
        try:
            raise torch.OutOfMemoryError(CUDA_TEXT)
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")

    asked = r"asking for 2\.50 GiB"
    with pytest.raises(InsufficientMemoryError, match=asked), out_of_memory("here", CPU, STEP):
        capture()


def test_other_errors_pass_as_they_are() -> None:
    for error in (ValueError("x"), RuntimeError("shapes differ"), InsufficientMemoryError("mine")):
        with pytest.raises(type(error)) as caught, out_of_memory("here", CPU, "knob"):
            raise error
        assert caught.value is error


def test_a_pool_that_cannot_be_allocated_names_its_size_and_the_options() -> None:
    layout = KVLayout(2, 2, 64, "float32", 16)
    with pytest.raises(InsufficientMemoryError, match=r"KV pool of .*TiB.*lower --kv-memory"):
        KVCache(layout, 1 << 40, CPU)


def test_weights_that_do_not_fit_name_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(CUDA_TEXT)

    monkeypatch.setattr(Decoder, "__init__", full)
    with pytest.raises(InsufficientMemoryError, match=r"while loading the weights.*--dtype"):
        LLM(str(tiny_model("llama")), device="cpu", attention="cpu", kv_memory="1MiB")


def test_in_a_step_its_requests_end_with_the_error_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM(str(tiny_model("llama")), device="cpu", attention="cpu", kv_memory="1MiB")
    expected = llm.generate([[1, 2, 3]], greedy(5))[0].token_ids
    forward = Decoder.forward

    def full(self: Decoder, token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(token_ids) == 7:
            raise torch.OutOfMemoryError(CUDA_TEXT)
        return forward(self, token_ids, *rest)

    monkeypatch.setattr(Decoder, "forward", full)
    (failed,) = llm.generate([list(range(7))], greedy(5))
    assert failed.outputs[0].error is not None
    assert "InsufficientMemoryError" in failed.outputs[0].error
    assert "a step of 7 tokens and 1 sequences, asking for 2.50 GiB" in failed.outputs[0].error
    assert "--max-num-batched-tokens" in failed.outputs[0].error
    assert llm.generate([[1, 2, 3]], greedy(5))[0].token_ids == expected
