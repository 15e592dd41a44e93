"""A GGUF file's shape for planning, also of families that the engine does not run.

The header alone is read: metadata, and the tensors' shapes, which count the weights exactly.
"""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path
from typing import Any

from pagelab.errors import UnsupportedModelError
from pagelab.models.gguf_file import GGUFFile
from pagelab.models.gguf_model import read_spec
from pagelab.models.model_shape import ModelShape, shape_of_config, shape_of_spec

_FAMILIES = {"gemma3": "gemma3_text", "gpt-oss": "gpt_oss"}  # where llama.cpp's name differs
_NOTE = "a weight takes what --dtype says: the engine dequantizes GGUF files"

# llama.cpp's name of a size, and transformers'
_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.chunk_size": "attention_chunk_size",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "full_attention_interval": "full_attention_interval",
    "context_length": "max_position_embeddings",
    "expert_count": "num_local_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}


def shape_of_gguf(path: Path, name: str) -> ModelShape:
    """The shape of the model in a GGUF file.

    Raises:
        ModelNotFoundError, CorruptModelError: the file cannot be read, or is broken.
        UnsupportedModelError: K/V that planning does not know; the field is named.
    """
    file = GGUFFile(path)
    try:
        shape = shape_of_spec(read_spec(file), name)
    except UnsupportedModelError as error:
        shape = _other_family(file, name)
        notes = (f"the engine does not run it ({error})", *shape.notes)
        shape = dataclasses.replace(shape, notes=notes)
    return dataclasses.replace(shape, notes=(_NOTE, *shape.notes))


def _other_family(file: GGUFFile, name: str) -> ModelShape:
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str):
        raise UnsupportedModelError(f"{file.path}: general.architecture is {kind!r}")
    fields: dict[str, Any] = {"model_type": _FAMILIES.get(kind, kind), "use_sliding_window": True}
    for theirs, ours in _FIELDS.items():
        value = file.metadata.get(f"{kind}.{theirs}")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModelError(
                f"{file.path}: {kind}.{theirs} differs from layer to layer: not planned for"
            )
        if value:  # 0 says that there is none
            fields[ours] = value
    key, value = (file.metadata.get(f"{kind}.attention.{k}_length") for k in ("key", "value"))
    if key != value:
        raise UnsupportedModelError(
            f"{file.path}: {kind}.attention.value_length is {value}, keys have {key}: not planned"
        )
    fields.setdefault("sliding_window", None)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        fields["vocab_size"] = len(tokens)
    if "token_embd.weight" in file.tensors:
        fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    shape = shape_of_config(fields, file.path, name)
    return _with_counted_weights(shape, sum(prod(t.shape) for t in file.tensors.values()))


def _with_counted_weights(shape: ModelShape, total: int) -> ModelShape:
    """The shape with its tensors' own count; what the family's formula missed is replicated."""
    difference = total - shape.parameters.total
    parameters = shape.parameters
    if parameters.replicated + difference >= 0:
        parameters = dataclasses.replace(parameters, replicated=parameters.replicated + difference)
        notes = tuple(note for note in shape.notes if "is an estimate" not in note)
        return dataclasses.replace(shape, parameters=parameters, exact=True, notes=notes)
    return shape
