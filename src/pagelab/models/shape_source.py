"""From what a user wrote after `--model` to a shape to plan with: no weights are fetched.

::

    nothing, "smollm2"     → the default model's built-in shape
    ./folder               → its config.json
    x.gguf                 → its header
    gpt2, llama-3.1-8b, …  → built in (where no folder has that name)
    Qwen/Qwen3-4B, …       → config.json from the hub's cache, or the hub
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pagelab.errors import ModelNotFoundError, UnsupportedModelError
from pagelab.models import default_model
from pagelab.models.fetch import ModelSource, asking_hub, is_path, resolve
from pagelab.models.hf_config import read_config, read_json
from pagelab.models.model_shape import ModelShape, shape_of_config, shape_of_spec
from pagelab.models.shapes import BUILT_IN

_DEFAULT = "smollm2-135m"


def load_shape(model: str | None) -> ModelShape:
    """Find a model's shape.

    Args:
        model: None for the default model; a folder, a `.gguf` file, a built-in name, a hub id.

    Raises:
        ModelNotFoundError: there is none of that name, or the hub cannot be reached.
        CorruptModelError: its description is broken.
        UnsupportedModelError: K/V that planning does not know; the field is named.
    """
    text = (model or "").strip()
    if default_model.is_default(text):
        return built_in_shape(_DEFAULT)
    path = Path(text).expanduser()
    if path.exists():
        source = resolve(text)
        if source.kind == "folder":
            return _folder_shape(source.path, source.name)
        from pagelab.models.gguf_shape import shape_of_gguf

        return shape_of_gguf(source.path, source.name)
    if text.lower() in BUILT_IN:
        return built_in_shape(text.lower())
    if is_path(text):
        raise ModelNotFoundError(f"there is no model at {text}: no such folder or file")
    return _folder_shape(_hub_config(text).parent, text.rpartition("/")[2])


def resolve_shape(model: str | None) -> ModelSource:
    """Find a model's description for an engine with random weights: weights are not fetched.

    Args:
        model: as in `load_shape`. `registry.load_spec` then says whether the engine runs it.

    Raises:
        ModelNotFoundError, UnsupportedModelError: as `load_shape`.
    """
    text = (model or "").strip()
    if default_model.is_default(text):
        text = _DEFAULT
    if Path(text).expanduser().exists():
        return resolve(text)
    name = text.lower()
    if name in BUILT_IN:
        return ModelSource("shape", Path("built-in", name), name, f"the built-in shape {name}")
    if is_path(text):
        raise ModelNotFoundError(f"there is no model at {text}: no such folder or file")
    folder = _hub_config(text).parent
    return ModelSource("folder", folder, text.rpartition("/")[2], f"config.json of {text}")


def built_in_shape(name: str) -> ModelShape:
    """A shape that PageLab brings with it (`shapes.BUILT_IN`)."""
    shape = shape_of_config(BUILT_IN[name], Path(f"built-in {name}"), name)
    if name == "gemma-3-27b":
        note = "only the text part is counted: the vision tower's 0.42 B weights come on top"
        shape = dataclasses.replace(shape, notes=(note, *shape.notes))
    return shape


def _folder_shape(folder: Path, name: str) -> ModelShape:
    try:
        return shape_of_spec(read_config(folder), name)
    except UnsupportedModelError as error:
        path = folder / "config.json"
        shape = shape_of_config(read_json(path), path, name)
        notes = (f"the engine does not run it ({error})", *shape.notes)
        return dataclasses.replace(shape, notes=notes)


def _hub_config(repo: str) -> Path:
    """A hub model's config.json, in the hub's own cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    known = f"the built-in shapes are {', '.join(BUILT_IN)}"
    with asking_hub(repo, known):
        try:
            return Path(hf_hub_download(repo, "config.json"))
        except hub.HFValidationError as error:
            raise ModelNotFoundError(
                f"--model {repo!r} is no folder, .gguf file or hub id; {known}"
            ) from error
        except hub.LocalEntryNotFoundError:  # a kind of the next
            raise
        except hub.EntryNotFoundError as error:
            raise ModelNotFoundError(f"{repo} on the hub has no config.json") from error
