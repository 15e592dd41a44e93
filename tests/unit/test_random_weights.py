"""Random weights: of the true shape, seeded, and enough for an engine that has no files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from pagelab.models.random_weights import RandomWeights
from pagelab.models.registry import load_spec, load_tokenizer, load_weights
from pagelab.models.shape_source import resolve_shape
from pagelab.models.weights import expected_weights
from tests.support.engines import greedy
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
TINY_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def config_folder(path: Path) -> Path:
    (path / "config.json").write_text(json.dumps(TINY_CONFIG))
    return path


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "qwen3"])
def test_every_weight_is_drawn_in_its_shape_and_dtype(name: str) -> None:
    spec = load_spec(resolve_shape(str(tiny_model(name))))
    weights = RandomWeights(spec, torch.bfloat16, CPU)
    shapes = expected_weights(spec)
    assert list(weights) == list(shapes)
    for key, shape in shapes.items():
        tensor = weights.pop(key)
        assert (tensor.shape, tensor.dtype) == (shape, torch.bfloat16)
        is_norm = len(shape) == 1 and key.endswith(".weight")
        assert tensor.float().mean() == pytest.approx(float(is_norm), abs=0.02)
        assert 0.01 < tensor.float().std() < 0.03
    assert len(weights) == 0


def test_a_weight_depends_on_its_name_and_the_seed_only() -> None:
    spec = load_spec(resolve_shape(str(tiny_model("llama"))))
    first, second = (RandomWeights(spec, torch.float32, CPU) for _ in range(2))
    names = list(first)
    forward = {name: first.pop(name) for name in names}
    backward = {name: second.pop(name) for name in reversed(names)}
    assert all(torch.equal(forward[name], backward[name]) for name in names)
    assert not torch.equal(forward[names[2]], forward[names[2].replace("layers.0", "layers.1")])
    other = RandomWeights(spec, torch.float32, CPU, seed=1)
    assert not torch.equal(other.pop(names[0]), forward[names[0]])


def test_a_folder_with_only_a_config_generates(tmp_path: Path) -> None:
    folder = str(config_folder(tmp_path))
    options = {"kv_memory": "1MiB", "device": "cpu", "dtype": "float32"}
    llm = LLM(folder, random_weights=True, **options)  # type: ignore[arg-type]
    (output,) = llm.generate([[1, 2, 3]], greedy(5))
    assert len(output.token_ids) == 5
    assert output.text == ""
    again = LLM(folder, random_weights=True, **options)  # type: ignore[arg-type]
    assert again.generate([[1, 2, 3]], greedy(5))[0].token_ids == output.token_ids


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        (None, 134_515_008),
    ],
)
def test_built_in_shapes_are_the_published_models(name: str | None, parameters: int) -> None:
    source = resolve_shape(name)
    spec = load_spec(source)
    assert source.kind == "shape"
    assert spec.num_parameters == parameters
    with pytest.raises(ModelNotFoundError, match="draw random ones"):
        load_weights(source, spec)
    with pytest.raises(ModelNotFoundError, match="give token ids"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opt-13b", "model_type is 'opt': PageLab has llama"),
        ("gemma-3-270m", "model_type is 'gemma3_text'"),
        ("mistral-7b", "sliding_window is 4096"),
    ],
)
def test_shapes_that_the_decoder_cannot_run_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        LLM(name, random_weights=True)


def test_on_a_cpu_one_step_is_in_flight(tmp_path: Path) -> None:
    options = {"random_weights": True, "kv_memory": "1MiB", "device": "cpu", "dtype": "float32"}
    llm = LLM(str(config_folder(tmp_path)), **options)  # type: ignore[arg-type]
    assert llm.core.scheduler.config.max_steps_in_flight == 1
    with pytest.raises(ConfigError, match="leave --max-steps-in-flight out"):
        LLM(str(tmp_path), max_steps_in_flight=2, **options)  # type: ignore[arg-type]
