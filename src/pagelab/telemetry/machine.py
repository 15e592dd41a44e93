"""The processor, its instruction sets and cores, RAM, and the limits of a container.

Cheap: `/proc`, `/sys` and `sysctl` first; py-cpuinfo only where those know nothing.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

INSTRUCTION_SETS = {
    # name shown: spellings in /proc/cpuinfo, sysctl and py-cpuinfo
    "avx2": ("avx2",),
    "avx512f": ("avx512f",),
    "avx512_bf16": ("avx512_bf16", "avx512bf16"),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "amx": ("amx_tile", "amx_bf16", "amx_int8"),
    "neon": ("neon", "asimd", "hw.optional.neon", "hw.optional.arm.advsimd"),
    "bf16": ("bf16", "hw.optional.arm.feat_bf16"),
    "i8mm": ("i8mm", "hw.optional.arm.feat_i8mm"),
    "sve": ("sve",),
}


# The processor


def cpu_model() -> str:
    """The processor's name."""
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "cpu model"):
            return value.strip()
    return _sysctl("machdep.cpu.brand_string") or _cpuinfo("brand_raw") or platform.processor()


def instruction_sets() -> list[str]:
    """The instruction sets of `INSTRUCTION_SETS` that this processor has, in that order."""
    return _known_sets(_cpu_flags())


def _known_sets(flags: Iterable[str]) -> list[str]:
    have = {flag.lower() for flag in flags}
    return [name for name, spellings in INSTRUCTION_SETS.items() if have.intersection(spellings)]


def _cpu_flags() -> set[str]:
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86; ARM
            return set(value.split())
    if platform.system() == "Darwin":
        listed = _run(["sysctl", "-a", "hw.optional", "machdep.cpu"]).splitlines()
        on = {line.split(":")[0] for line in listed if line.rstrip().endswith(": 1")}
        words = {word for line in listed if "features:" in line for word in line.split()[1:]}
        return on | words
    flags = _cpuinfo("flags")
    return set(flags) if isinstance(flags, list) else set()


def _cpuinfo(key: str) -> Any:
    """Ask py-cpuinfo, which takes about a second: only where the direct ways know nothing."""
    try:
        import cpuinfo

        return cpuinfo.get_cpu_info().get(key)
    except Exception:  # it parses the output of foreign programs
        return None


def available_cores() -> int:
    """Physical cores that this process may use: affinity and cgroup quota respected."""
    allowed = _affinity()
    cores = _physical_cores(allowed)
    quota = _cgroup_cpus()
    return max(1, min(cores, int(quota))) if quota is not None else max(1, cores)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Count cores, not their hardware threads."""
    cores: set[str] = set()
    for cpu in cpus:
        siblings = root / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(f"cpu{cpu}")
    physical = psutil.cpu_count(logical=False)
    return min(len(cores), physical) if physical else len(cores)


# Limits of a container


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> float | None:
    """CPUs that the cgroup's quota amounts to; None without one."""
    limits: list[float] = []
    for folder in _cgroup_folders(root, "cpu", own):
        words = _read(folder / "cpu.max").split()  # version 2: "quota period"
        if not words:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            words = [quota.strip(), period.strip()]
        try:
            quota_us, period_us = int(words[0]), int(words[1])
        except (ValueError, IndexError):  # "max", or no such file
            continue
        if quota_us > 0 and period_us > 0:
            limits.append(quota_us / period_us)
    return min(limits, default=None)


def _cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: str | None = None
) -> tuple[int, int] | None:
    """(limit, in use) of the tightest memory limit, bytes; None without one."""
    tightest: tuple[int, int] | None = None
    for folder in _cgroup_folders(root, "memory", own):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit = int(_read(folder / limit_file))
                used = int(_read(folder / used_file))
            except ValueError:  # "max", or no such file
                continue
            # version 1 writes "no limit" as a huge number
            if limit < 1 << 60 and (tightest is None or limit - used < tightest[0] - tightest[1]):
                tightest = (limit, used)
    return tightest


def _cgroup_folders(root: Path, controller: str, own: str | None) -> list[Path]:
    """Folders whose limits apply: this process's cgroup and its parents, versions 1 and 2."""
    text = _read(Path("/proc/self/cgroup")) if own is None else own
    folders: list[Path] = []
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        relative = Path(path.lstrip("/"))
        if ".." not in relative.parts:
            folders += [base / relative, *(base / parent for parent in relative.parents)]
        folders.append(base)
    return list(dict.fromkeys(folders))


def ram() -> dict[str, int | None]:
    """Main memory in bytes: total, available to this process, and the container's limit."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    limit = _cgroup_memory()
    if limit is not None:
        total = min(total, limit[0])
        available = min(available, max(0, limit[0] - limit[1]))
    return {
        "total_bytes": total,
        "available_bytes": available,
        "limit_bytes": limit[0] if limit is not None else None,
    }


# Small readers


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return _read(path).splitlines()


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _sysctl(name: str) -> str:
    return _run(["sysctl", "-n", name]).strip() if platform.system() == "Darwin" else ""
