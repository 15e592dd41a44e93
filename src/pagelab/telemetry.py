"""What this machine is, and what memory a process takes. Never imports torch.

Two halves::

    describe_environment ──▶ dict ──▶ what_runs ──▶ rows for `pagelab check`
    MemorySampler (a thread) ──▶ columns: seconds, RSS bytes, GPU bytes of a process tree

The experiment's parent process uses both while another process works, so everything here is
cheap: `/proc` and NVML rather than libraries that take a second to load.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pagelab.results import MemorySamples

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


# GPUs


def gpus() -> list[dict[str, Any]]:
    """Each NVIDIA GPU with its memory in bytes, by NVML; empty without a driver."""
    found: list[dict[str, Any]] = []
    with _Nvml() as nvml:
        for index, handle in enumerate(nvml.handles):
            try:
                memory = nvml.api.nvmlDeviceGetMemoryInfo(handle)
                name = nvml.api.nvmlDeviceGetName(handle)
            except nvml.api.NVMLError:
                continue
            found.append(
                {
                    "index": index,
                    "name": name.decode() if isinstance(name, bytes) else str(name),
                    "memory_total_bytes": int(memory.total),
                    "memory_free_bytes": int(memory.free),
                }
            )
    return found


class _Nvml:
    """NVML while it is open; `handles` is empty where there is no driver, which is normal."""

    def __init__(self) -> None:
        self.api: Any = None
        self.handles: list[Any] = []

    def __enter__(self) -> _Nvml:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # not installed, no library, no driver, no permission
            return self
        self.api = pynvml
        try:
            count = pynvml.nvmlDeviceGetCount()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError:
            self.handles = []
        return self

    def __exit__(self, *_: object) -> None:
        if self.api is not None:
            with contextlib.suppress(self.api.NVMLError):
                self.api.nvmlShutdown()

    def process_bytes(self, pids: set[int]) -> int | None:
        """GPU memory of these processes; None where NVML cannot say."""
        total, known = 0, False
        for handle in self.handles:
            try:
                processes = self.api.nvmlDeviceGetComputeRunningProcesses(handle)
            except self.api.NVMLError:
                continue
            known = True
            total += sum(int(p.usedGpuMemory or 0) for p in processes if p.pid in pids)
        return total if known else None


# Memory of processes


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def rss_bytes(pid: int, children: bool = True) -> int:
    """Resident bytes of a process (and its descendants); 0 when it is gone.

    Pages that processes share are counted in each of them.
    """
    return _sum_rss(process_tree(pid) if children else [pid])


def _sum_rss(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # it vanished, or is not ours
            continue
    return total


def own_peak_rss_bytes() -> int | None:
    """This process's peak since it started, as the kernel kept it; None where it does not.

    Linux only: `getrusage` would include the memory of the process that forked this one.
    """
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


class MemorySampler:
    """Samples the memory of a process and its children from outside, in a thread.

    Use it as a context manager, or `start` and `stop`. Listing children walks the process
    table, so that is done ten times less often than reading their sizes.

    Args:
        pid: the process.
        interval_s: seconds between samples.
        started: the `time.time()` that counts as 0; now, if not given.
    """

    CHILDREN_EVERY = 10

    def __init__(self, pid: int, interval_s: float = 0.05, started: float | None = None) -> None:
        self._pid = pid
        self._interval = interval_s
        self._started = time.time() if started is None else started
        self._t: list[float] = []
        self._rss: list[int] = []
        self._device: list[int] = []
        self._device_known = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="memory-sampler", daemon=True)
        self._nvml = _Nvml()
        self._lock = threading.Lock()
        self._pids: list[int] = [pid]

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin sampling."""
        self._nvml.__enter__()
        self._thread.start()

    def stop(self) -> None:
        """End sampling; what was sampled stays."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._nvml.__exit__()

    def sample(self) -> tuple[float, int, int | None]:
        """Take a sample now: (seconds, RSS bytes, GPU bytes or None); kept in the columns.

        Where the process has ended by now, its last sample is repeated.
        """
        with self._lock:
            self._pids = process_tree(self._pid)
            t, rss, device = self._take()
            if rss == 0 and self._rss:
                rss, device = self._rss[-1], self._device[-1] if self._device_known else None
            return t, rss, device

    @property
    def peak_rss_bytes(self) -> int | None:
        """The largest sample."""
        return max(self._rss, default=None)

    @property
    def peak_device_bytes(self) -> int | None:
        """The largest GPU sample; None without a GPU."""
        return max(self._device, default=None) if self._device_known else None

    def columns(self, limit: int = 2000) -> MemorySamples:
        """The samples so far; those in which the process was gone already are left out.

        Of more than `limit` samples, the largest of each of `limit` stretches is kept.
        """
        with self._lock:
            count = len(self._t)
            stretches = [range(k * count // limit, (k + 1) * count // limit) for k in range(limit)]
            kept = (
                range(count)
                if count <= limit
                else [max(stretch, key=self._rss.__getitem__) for stretch in stretches]
            )
            return {
                "t": [self._t[i] for i in kept],
                "rss_bytes": [self._rss[i] for i in kept],
                "device_bytes": [self._device[i] for i in kept] if self._device_known else None,
                "source": "psutil, children included"
                + ("; NVML per process" if self._device_known else ""),
            }

    def _loop(self) -> None:
        count = 0
        while not self._stop.is_set():
            with self._lock:
                if count % self.CHILDREN_EVERY == 0:
                    self._pids = process_tree(self._pid)
                self._take()
            count += 1
            self._stop.wait(self._interval)

    def _take(self) -> tuple[float, int, int | None]:
        now = round(time.time() - self._started, 4)
        rss = _sum_rss(self._pids)
        device = self._nvml.process_bytes(set(self._pids)) if self._nvml.handles else None
        if rss > 0:  # otherwise it has ended
            self._t.append(now)
            self._rss.append(rss)
            self._device.append(device or 0)
            self._device_known = self._device_known or device is not None
        return now, rss, device


class OtherLoad:
    """Whether other programs took processor time from ours, from construction to `cores`.

    OpenMP programs collapse when another program takes a core, so figures from a busy machine
    are not to be believed.
    """

    BUSY = 0.85  # of the hardware threads in use: below that, ours had what it asked for

    def __init__(self) -> None:
        self._t, self._all, self._ours = time.monotonic(), _busy_seconds(), _our_seconds()

    def cores(self) -> float:
        """Cores that others used on average; 0 while the machine had cores to spare."""
        elapsed = time.monotonic() - self._t
        if elapsed <= 0:
            return 0.0
        everyone = (_busy_seconds() - self._all) / elapsed
        others = everyone - (_our_seconds() - self._ours) / elapsed
        return max(0.0, others) if everyone >= self.BUSY * (os.cpu_count() or 1) else 0.0


def _busy_seconds() -> float:
    """Processor seconds that the whole machine has worked so far."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def _our_seconds() -> float:
    """Those of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


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
