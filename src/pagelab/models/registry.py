"""A model's files → its spec, its weights, its tokenizer, whatever kind of files they are.

Nothing here imports torch before weights are asked for.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from pagelab.errors import ModelNotFoundError
from pagelab.models.fetch import ModelSource
from pagelab.models.hf_config import read_config, spec_of_config
from pagelab.models.shapes import BUILT_IN
from pagelab.models.spec import ModelSpec
from pagelab.models.tokenizer import Tokenizer
from pagelab.models.weights import expected_weights

if TYPE_CHECKING:
    import torch

__all__ = ["expected_weights", "load_spec", "load_tokenizer", "load_weights", "open_weights"]


def load_spec(source: ModelSource) -> ModelSpec:
    """Describe a model; its weights are not read.

    Raises:
        ModelNotFoundError: config.json or the file is gone.
        CorruptModelError: the description is broken.
        UnsupportedModelError: an architecture or an option that PageLab does not have.
    """
    if source.kind == "folder":
        return read_config(source.path)
    if source.kind == "shape":
        return spec_of_config(BUILT_IN[source.name], source.path)
    from pagelab.models.gguf_file import GGUFFile
    from pagelab.models.gguf_model import read_spec

    return read_spec(GGUFFile(source.path))


def load_weights(source: ModelSource, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """All of `expected_weights(spec)`, on the CPU.

    Floats keep the dtype of the file; quantized tensors come as float32.

    Raises:
        ModelNotFoundError: the files are gone.
        CorruptModelError: truncated; a shard or tensor is missing, or has another shape.
        UnsupportedModelError: a tensor's type cannot be read.
    """
    return dict(open_weights(source, spec))


def open_weights(source: ModelSource, spec: ModelSpec) -> MutableMapping[str, torch.Tensor]:
    """The same, but nothing is read before it is taken: files are mapped into memory.

    A quantized tensor is dequantized whenever it is taken: take each once (`pop`).

    Raises:
        ModelError: as `load_weights`; a type that cannot be read, when it is taken.
    """
    if source.kind == "folder":
        from pagelab.models.safetensors_folder import read_weights

        return read_weights(source.path, spec)
    if source.kind == "shape":
        raise ModelNotFoundError(f"{source.name} is a shape without weights: draw random ones")
    from pagelab.models.gguf_file import GGUFFile
    from pagelab.models.gguf_weights import GGUFWeights

    return GGUFWeights(GGUFFile(source.path), spec)


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The model's tokenizer, chat template included.

    Raises:
        ModelNotFoundError: the model has none (token ids still work).
        CorruptModelError: its files are broken.
        UnsupportedModelError: a kind that neither `tokenizers` nor transformers can read.
    """
    if source.kind == "folder":
        from pagelab.models.folder_tokenizer import read_tokenizer

        return read_tokenizer(source.path)
    if source.kind == "shape":
        raise ModelNotFoundError(f"{source.name} is a shape without a tokenizer: give token ids")
    from pagelab.models.gguf_file import GGUFFile
    from pagelab.models.gguf_tokenizer import build_tokenizer

    return build_tokenizer(GGUFFile(source.path))
