"""What the experiment must know of a model before any method runs: no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.errors import ModelError
from pagelab.models.fetch import resolve
from pagelab.models.registry import load_spec, load_tokenizer
from pagelab.results import ModelInfo
from pagelab.workloads import Decode, Encode


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's description, its own maximum length, and its tokenizer if it has one."""

    info: ModelInfo
    max_position: int
    encode: Encode | None
    decode: Decode | None


def model_facts(model: str | None, dtype: str) -> ModelFacts:
    """Find a model (fetching it if need be) and describe it in an experiment's dtype.

    Raises:
        ModelError: it cannot be found, fetched or read.
    """
    source = resolve(model)
    spec = load_spec(source)
    info: ModelInfo = {
        "name": source.name,
        "source": source.describe(),
        "architecture": spec.architecture,
        "num_parameters": spec.num_parameters,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "kv_bytes_per_token": spec.kv_layout(dtype, 1).bytes_per_token,
    }
    try:
        tokenizer = load_tokenizer(source)
    except ModelError:  # prompts are random token ids then
        return ModelFacts(info, spec.max_position, None, None)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return ModelFacts(info, spec.max_position, encode, tokenizer.decode)
