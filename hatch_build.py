"""Compiles the extension for CPUs where there is a C++ compiler; without one PageLab installs, too.

`PAGELAB_COMPILE=0` leaves it out, `PAGELAB_COMPILE=1` makes a failure an error. `CXX` names the
compiler. Run as a script it compiles in place: `python hatch_build.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    BuildHookInterface = object

FOLDER = Path("src/pagelab/native")
LIBRARY = FOLDER / "_pagelab.so"

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
# gcc 12 warns about its own intrinsics' undefined values
_QUIET = ("-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_WIDE = "-mprefer-vector-width=512"
# instruction set: the compiler's flags for it
_SETS: dict[str, dict[str, Sequence[str]]] = {
    "x86_64": {
        "avx512_vnni": (*_AVX512, "-mavx512vnni", "-mavx512bf16", _WIDE),
        "avx512": (*_AVX512, _WIDE),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "baseline": (),
    },
    "aarch64": {
        "neon_bf16": ("-march=armv8.2-a+dotprod+bf16",),
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
        "neon": (),
    },
}


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Adds the library to a wheel, and compiles it in place for an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built (`version` is `editable` or `standard`)."""
        if self.target_name != "wheel":
            return
        if compile_extension(Path(self.root)):
            build_data["pure_python"] = False
            # the library knows nothing of Python: one wheel serves every version of it
            tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{tag}"
            build_data["artifacts"].append(str(LIBRARY))


def compile_extension(root: Path) -> bool:
    """Compile into the source tree; False where that cannot be done.

    Raises:
        RuntimeError: it failed, and PAGELAB_COMPILE asks for it.
    """
    wish = os.environ.get("PAGELAB_COMPILE", "")
    if wish == "0":
        return False
    reason = _compile(root)
    if reason is None:
        return True
    (root / LIBRARY).unlink(missing_ok=True)  # an old one would not fit
    if wish == "1":
        raise RuntimeError(f"the extension was not compiled: {reason}")
    print(f"PageLab without its compiled extension: {reason}", file=sys.stderr)  # noqa: T201
    return False


def _compile(root: Path) -> str | None:
    """None, or why not."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None or os.name != "posix":
        return "no C++ compiler (g++ or clang++; or set CXX)"
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    tried = sys.platform == "linux" and machine in _SETS
    if not tried and os.environ.get("PAGELAB_COMPILE") != "1":
        where = f"{platform.system()} on {platform.machine()}"
        return f"it has not been tried with {where} (PAGELAB_COMPILE=1 compiles it anyway)"
    sets = _SETS.get(machine, {"baseline": ()})
    source = root / FOLDER / "csrc"
    with tempfile.TemporaryDirectory() as made:
        jobs = [(source / f"{name}.cpp", f"{made}/{name}.o", ()) for name in ("pool", "api")]
        for name, flags in sets.items():
            jobs.append((source / "isa.cpp", f"{made}/{name}.o", (f"-DPAGELAB_ISA={name}", *flags)))
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            errors = workers.map(
                lambda job: _run(
                    [compiler, *_FLAGS, *_QUIET, *job[2], "-c", str(job[0]), "-o", job[1]]
                ),
                jobs,
            )
            for error in errors:
                if error is not None:
                    return error
        library = f"{made}/library.so"
        objects = [job[1] for job in jobs]
        # the C++ library goes in: the user's machine may have an older one
        static = () if sys.platform == "darwin" else ("-static-libstdc++", "-static-libgcc")
        error = _run([compiler, "-shared", "-o", library, *objects, *static, "-pthread"])
        if error is None:
            # moved, not written over: a process may have it loaded
            target = root / LIBRARY
            shutil.copy(library, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)
        return error


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"{' '.join(command)}\n{done.stderr}"


if __name__ == "__main__":
    os.environ.setdefault("PAGELAB_COMPILE", "1")
    compile_extension(Path(__file__).resolve().parent)
