"""Weights of a folder: `model.safetensors`, or shards named by `model.safetensors.index.json`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models.hf_config import read_json
from pagelab.models.spec import ModelSpec
from pagelab.models.weights import Shape, check_shapes, expected_weights

_DTYPES = {"F64", "F32", "F16", "BF16"}


def read_weights(folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The tensors of `expected_weights(spec)`, in the dtype of the file, mapped into memory.

    Tensors that the model does not need (buffers, a tied head) are left in the file.

    Raises:
        ModelNotFoundError: no safetensors here.
        CorruptModelError: a shard or a tensor is missing, truncated or of the wrong shape.
        UnsupportedModelError: a tensor is stored in a dtype that is no float.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in _shards(folder)]
        # each tensor by the name that we use: its file, and its name there
        places = {_our_name(name, spec): (file, name) for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
        found: dict[str, Shape] = {}
        for ours in expected_weights(spec).keys() & places.keys():
            file, name = places[ours]
            view = file.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise UnsupportedModelError(
                    f"{folder}: {name} is stored as {view.get_dtype()}; PageLab reads floats"
                )
            found[ours] = tuple(view.get_shape())
        check_shapes(found, spec, folder)
        return {ours: places[ours][0].get_tensor(places[ours][1]) for ours in found}


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CorruptModelError(f"{index} has no weight_map from tensors to files")
        paths = [folder / name for name in sorted(set(names.values()))]
        for path in paths:
            if not path.is_file():
                raise CorruptModelError(f"{folder} lacks the shard {path.name} of its index")
        return paths
    one = folder / "model.safetensors"
    if one.is_file():
        return [one]
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) > 1:
        raise CorruptModelError(
            f"{folder} has {len(paths)} safetensors files but no model.safetensors.index.json"
        )
    if not paths:
        raise ModelNotFoundError(f"{folder} has no *.safetensors, which PageLab reads weights from")
    return paths


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CorruptModelError(f"{path} is no whole safetensors file: {error}") from error


def _our_name(name: str, spec: ModelSpec) -> str:
    """GPT-2's older files leave out the leading `transformer.`."""
    if spec.architecture == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name
