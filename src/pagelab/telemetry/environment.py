"""What is installed here, and what runs on this machine. Never imports torch.

::

    describe_environment ──▶ dict ──▶ what_runs ──▶ rows for `pagelab check`
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pagelab.telemetry.machine import available_cores, cpu_model, instruction_sets, ram
from pagelab.telemetry.memory import gpus

PACKAGES = ("transformers", "tokenizers", "safetensors", "gguf", "numpy", "vllm")


class Capability(NamedTuple):
    """Whether one thing runs on this machine, and why (not)."""

    name: str
    runs: bool
    why: str


# The environment


def describe_environment(
    model_cache: Path | None = None, *, probe_torch: bool = False
) -> dict[str, Any]:
    """Describe this machine and installation, JSON-able; sizes in bytes.

    Args:
        model_cache: the folder of fetched models, to be described too.
        probe_torch: ask torch itself what it can do, in a process of its own (2 to 10 seconds);
            otherwise only its version and build are read from its files.
    """
    environment: dict[str, Any] = {
        "os": {
            "name": _os_name(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
            "virtual_env": sys.prefix if sys.prefix != sys.base_prefix else None,
        },
        "pagelab": package_version("pagelab"),
        "torch": torch_build(),
        "gpus": gpus(),
        "cpu": {
            "model": cpu_model(),
            "cores": available_cores(),
            "physical_cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            "logical_cores": os.cpu_count() or 1,
            "instruction_sets": instruction_sets(),
        },
        "memory": ram(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
    if model_cache is not None:
        environment["model_cache"] = {
            "path": str(model_cache),
            "exists": model_cache.is_dir(),
            "bytes": folder_bytes(model_cache),
        }
    if probe_torch and environment["torch"] is not None:
        environment["torch"].update(_probe_torch())
    return environment


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build() -> dict[str, Any] | None:
    """Version and build of torch, read from its files; None where it is not installed.

    `build` is `cpu`, `cu130`, `rocm6.4`, … or `default`; `cuda` the CUDA version it was built for.
    """
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).parent / "version.py"
    try:
        text = version_file.read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    version = found[1] if found else package_version("torch") or "unknown"
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return {
        "version": version,
        "build": version.partition("+")[2] or "default",
        "cuda": cuda[1] if cuda else None,
    }


_PROBE = """
import json, torch
print(json.dumps({
    "cuda_available": torch.cuda.is_available(),
    "mps_available": torch.backends.mps.is_available(),
    "threads": torch.get_num_threads(),
    "mkldnn": torch.backends.mkldnn.is_available(),
    "cpu_capability": torch.backends.cpu.get_cpu_capability(),
}))
"""


def _probe_torch() -> dict[str, Any]:
    """Ask torch in a process of its own, so that this one stays small."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"torch could not be asked: {error}"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _os_name() -> str:
    system = platform.system()
    if system == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", system)
    except OSError:
        return system


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except OSError:  # it vanished
            continue
    return total


# What runs here


def what_runs(environment: dict[str, Any]) -> list[Capability]:
    """Which methods and features run on this machine, and why the others do not.

    Reads `environment["default_model"]` too, where `lab.check` has put what it knows of it.
    """
    torch, packages = environment["torch"], environment["packages"]
    have_torch = torch is not None and "error" not in torch
    no_torch = "torch is not installed" if torch is None else str(torch.get("error"))
    have_hf = have_torch and packages["transformers"] is not None
    hf = (
        f"transformers {packages['transformers']}"
        if have_hf
        else (no_torch if not have_torch else "transformers is not installed")
    )
    cpu = environment["cpu"]
    on_cpu = f"{cpu['cores']} cores, {', '.join(cpu['instruction_sets']) or 'no vector sets known'}"
    rows = [
        Capability("pagelab on the CPU", have_torch, on_cpu if have_torch else no_torch),
        _cuda(environment, have_torch, no_torch),
        Capability("hf-generate", have_hf, hf),
        Capability("hf-static", have_hf, hf),
        Capability("vllm", *_vllm(packages)),
    ]
    default = environment.get("default_model")
    if default is not None:
        rows.append(Capability("default model", bool(default["ready"]), str(default["why"])))
    return rows


def _cuda(environment: dict[str, Any], have_torch: bool, no_torch: str) -> Capability:
    cards = environment["gpus"]
    if not have_torch:
        why, runs = no_torch, False
    elif not cards:
        why, runs = "no NVIDIA driver or GPU found", False
    elif environment["torch"]["cuda"] is None:
        why, runs = f"this torch is built without CUDA ({environment['torch']['build']})", False
    elif environment["torch"].get("cuda_available") is False:
        why, runs = "torch finds no usable CUDA device (driver too old?)", False
    else:
        runs = True
        why = ", ".join(f"{gpu['name']}" for gpu in cards)
    return Capability("torch on a GPU", runs, why)


def _vllm(packages: dict[str, str | None]) -> tuple[bool, str]:
    if packages["vllm"] is None:
        return False, "not installed (not needed)"
    return (
        False,
        f"vllm {packages['vllm']} is installed; `pagelab compare` has no method for it yet",
    )
