"""How the extension is found, turned off and compiled."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError
from pagelab.execution.logits.logprobs import ROWS_AT_ONCE
from pagelab.execution.native_runner import NativeRunner
from pagelab.native.library import instruction_sets, native, why_no_native
from tests.support.engines import greedy
from tests.support.tiny_models import tiny_gguf, tiny_model

ROOT = Path(__file__).parents[2]
needs_it = pytest.mark.skipif(native() is None, reason="the extension does not run here")
PROMPTS = [list(range(5, 5 + n)) for n in (1, 3, 40, 90)]


def engine(**options: Any) -> LLM:
    options = {"model": str(tiny_model("llama")), "kv_memory": "4MiB", "device": "cpu"} | options
    return LLM(options.pop("model"), **options)


def test_the_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGELAB_NATIVE", "0")
    assert native() is None
    assert why_no_native() == "PAGELAB_NATIVE is 0"
    assert engine().attention == "cpu"
    with pytest.raises(ConfigError, match="--attention native does not run here"):
        engine(attention="native")
    with pytest.raises(ConfigError, match="--quantization needs the compiled extension"):
        engine(quantization="q4")


@needs_it
def test_an_instruction_set_that_is_not_here_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAGELAB_NATIVE", "mmx")
    assert why_no_native() == f"PAGELAB_NATIVE is 'mmx': here are {', '.join(instruction_sets())}"


@needs_it
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_every_instruction_set_gives_torchs_tokens(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model(name))
    want = engine(model=model, attention="cpu").generate(PROMPTS, greedy(20))
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    llm = engine(model=model)
    assert llm.attention == "native"
    got = llm.generate(PROMPTS, greedy(20))
    assert [o.token_ids for o in got] == [o.token_ids for o in want]


@needs_it
def test_float16_runs_on_torch_and_says_why_where_the_extension_is_asked_for() -> None:
    assert engine(dtype="float16").attention == "cpu"
    with pytest.raises(ConfigError, match="float32 and bfloat16, not float16"):
        engine(dtype="float16", attention="native")


def test_quantization_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"--quantization needs|no quantization 'int3'"):
        engine(quantization="int3")
    with pytest.raises(ConfigError, match="--quantization needs --attention native"):
        engine(quantization="int8", attention="cpu")


@needs_it
@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"quantization": "q4"}, {}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_gets_the_same_tokens_alone_and_among_others(
    options: dict[str, Any], dtype: str
) -> None:
    """In every precision: no number of a row depends on the rows beside it."""
    options = {"dtype": dtype, "prefix_caching": False, "batch_invariant": True} | options
    together = engine(**options).generate([*PROMPTS * 4, PROMPTS[2][::-1]], greedy(24))
    for prompt, among in zip(
        [*PROMPTS, PROMPTS[2][::-1]], [*together[:4], together[-1]], strict=True
    ):
        (alone,) = engine(**options).generate([prompt], greedy(24))
        assert alone.token_ids == among.token_ids


@needs_it
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_files_blocks_give_the_tokens_of_their_own_values(name: str) -> None:
    """Q8_0 packed as it is, beside the same file dequantized to float32: near, for a tiny model."""
    path = str(tiny_gguf(name, "Q8_0"))
    kept = engine(model=path, quantization="q4", dtype="float32")
    exact = engine(model=path, dtype="float32")
    assert kept.core.runner.decoder.weight_bytes < 0.3 * exact.core.runner.decoder.weight_bytes  # type: ignore[attr-defined]
    agree = total = 0
    for got, want in zip(
        kept.generate(PROMPTS, greedy(1)), exact.generate(PROMPTS, greedy(1)), strict=True
    ):
        agree += got.token_ids == want.token_ids
        total += 1
    assert agree >= total - 1


def prompt_scores(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Log probabilities of a prompt's tokens, each given those before it."""
    params = replace(greedy(1), prompt_logprobs=1)
    rows = llm.generate([prompt], params)[0].prompt_logprobs
    assert rows is not None
    return torch.tensor([row.chosen for row in rows if row is not None])


@needs_it
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize(
    ("stored", "quantization", "limit"),
    [("Q8_0", "q4", 0.08), ("Q4_1", "q4", 0.08), ("Q4_1", "int8", 0.1)],
)
def test_quantized_kinds_stay_near_torch_on_the_dequantized_weights(
    stored: str, quantization: str, limit: float, kv: str
) -> None:
    """In norm at most `limit` of what the scores vary by. q4 takes blocks as they are: only inputs
    in 8 bits differ; int8 gives Q4_1's values a scale a channel beside.

    The limits are not derived but what a random tiny model was seen to do (0.04 to 0.07; bfloat16
    0.02 to 0.03, float32 1e-6) with room: they hold the kinds where they are. That one product is
    within its inputs' rounding is tested in `test_native_linear`."""
    path, prompt = str(tiny_gguf("qwen2", stored)), [(11 * i) % 250 for i in range(120)]
    want = prompt_scores(engine(model=path, dtype="float32", attention="cpu"), prompt)
    options = {"quantization": quantization, "dtype": "float32", "kv_cache_dtype": kv}
    got = prompt_scores(engine(model=path, **options), prompt)
    assert float((got - want).norm() / (want - want.mean()).norm()) < limit


@needs_it
def test_logits_of_a_prompt_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prompt_scores(engine(), PROMPTS[3])
    made: list[int] = []
    room = NativeRunner._empty_logits

    def noted(self: NativeRunner, rows: int) -> torch.Tensor:
        made.append(rows)
        return room(self, rows)

    monkeypatch.setattr(NativeRunner, "_empty_logits", noted)
    assert torch.equal(prompt_scores(engine(max_num_batched_tokens=37), PROMPTS[3]), whole)
    assert max(made) <= ROWS_AT_ONCE
    assert sum(made) == len(PROMPTS[3]), "all but the last, and the one that is sampled"


def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_compiler_the_build_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.delenv("PAGELAB_COMPILE", raising=False)
    (tmp_path / "src/pagelab/native").mkdir(parents=True)
    assert hook().compile_extension(tmp_path) is False
    assert "without its compiled extension" in capsys.readouterr().err
    monkeypatch.setenv("PAGELAB_COMPILE", "1")
    with pytest.raises(RuntimeError, match="the extension was not compiled"):
        hook().compile_extension(tmp_path)


@pytest.mark.parametrize(
    ("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64"), ("freebsd14", "x86_64")]
)
def test_where_it_has_not_been_tried_it_is_left_out(
    system: str,
    machine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.delenv("PAGELAB_COMPILE", raising=False)
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert hook().compile_extension(tmp_path) is False
    assert "it has not been tried" in capsys.readouterr().err


@pytest.mark.parametrize("compiled", [True, False])
def test_a_wheel_is_of_its_platform_only_with_the_extension_in_it(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = hook()
    monkeypatch.setattr(module, "compile_extension", lambda root: compiled)
    monkeypatch.setattr("sysconfig.get_platform", lambda: "linux-aarch64")
    building = SimpleNamespace(target_name="wheel", root=".")
    data: dict[str, Any] = {"artifacts": []}
    module.CustomBuildHook.initialize(building, "standard", data)
    assert data == (
        {
            "artifacts": ["src/pagelab/native/_pagelab.so"],
            "pure_python": False,
            "tag": "py3-none-linux_aarch64",
        }
        if compiled
        else {"artifacts": []}
    )


@needs_it
def test_the_instruction_sets_are_those_of_the_machine_the_plainest_last() -> None:
    known = list(hook()._SETS[{"arm64": "aarch64"}.get(platform.machine(), platform.machine())])
    here = list(instruction_sets())
    assert here == [name for name in known if name in here]
    assert here[-1] == known[-1]
