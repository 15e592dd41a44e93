"""This machine, and the memory of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pagelab import telemetry
from pagelab.telemetry import (
    MemorySampler,
    describe_environment,
    machine,
    memory,
    rss_bytes,
    what_runs,
)

SLEEPER = "import time; block = bytearray(60 << 20); print('ready', flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return describe_environment()


def test_the_environment_is_json_with_the_figures_of_this_machine(
    environment: dict[str, Any],
) -> None:
    assert json.loads(json.dumps(environment)) == environment
    assert environment["python"]["version"].startswith(f"{sys.version_info[0]}.")
    assert 0 < environment["memory"]["available_bytes"] <= environment["memory"]["total_bytes"]
    assert 1 <= environment["cpu"]["cores"] <= environment["cpu"]["logical_cores"]
    assert environment["cpu"]["model"]
    assert environment["torch"]["version"].count(".") >= 2


def test_describing_imports_no_torch() -> None:
    code = (
        "import sys; from pagelab.telemetry import describe_environment; describe_environment();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'cpuinfo') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_model_cache_is_measured(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    cache = describe_environment(tmp_path)["model_cache"]
    assert cache == {"path": str(tmp_path), "exists": True, "bytes": 5}
    assert describe_environment(tmp_path / "none")["model_cache"]["bytes"] == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "sse2"},
         ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx"]),
        ({"fp", "asimd", "bf16", "i8mm", "sve"}, ["neon", "bf16", "i8mm", "sve"]),
        ({"hw.optional.neon", "hw.optional.arm.FEAT_BF16"}, ["neon", "bf16"]),
        (set(), []),
    ],
)  # fmt: skip
def test_instruction_sets_by_the_spellings_of_each_system(
    flags: set[str], expected: list[str]
) -> None:
    assert machine._known_sets(flags) == expected


def cgroup(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_tightest_cpu_quota_of_the_cgroups_above_counts(tmp_path: Path) -> None:
    cgroup(tmp_path, {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"})
    assert machine._cgroup_cpus(tmp_path, "0::/a/b") == 2.0
    cgroup(tmp_path, {"a/b/cpu.max": "50000 100000"})
    assert machine._cgroup_cpus(tmp_path, "0::/a/b") == 0.5
    assert machine._cgroup_cpus(tmp_path, "0::/elsewhere") is None


def test_cgroups_of_version_one_are_read_too(tmp_path: Path) -> None:
    cgroup(
        tmp_path,
        {
            "cpu/box/cpu.cfs_quota_us": "300000",
            "cpu/box/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": "1000",
            "memory/box/memory.usage_in_bytes": "400",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "5",
        },
    )
    own = "4:cpu,cpuacct:/box\n7:memory:/box\n"
    assert machine._cgroup_cpus(tmp_path, own) == 3.0
    assert machine._cgroup_memory(tmp_path, own) == (1000, 400)


def test_the_tightest_memory_limit_is_the_one_with_the_least_left(tmp_path: Path) -> None:
    cgroup(
        tmp_path,
        {
            "a/memory.max": "5000",
            "a/memory.current": "4900",
            "a/b/memory.max": "1000",
            "a/b/memory.current": "100",
        },
    )
    assert machine._cgroup_memory(tmp_path, "0::/a/b") == (5000, 4900)


def test_a_memory_limit_bounds_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup_memory", lambda: (1 << 20, 1 << 19))
    assert telemetry.ram() == {
        "total_bytes": 1 << 20,
        "available_bytes": 1 << 19,
        "limit_bytes": 1 << 20,
    }


def test_hardware_threads_are_not_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 2)
    assert machine._physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert machine._physical_cores({0, 2}, tmp_path) == 1


def test_what_runs_says_why_not(environment: dict[str, Any]) -> None:
    rows = {row.name: row for row in what_runs(environment)}
    assert rows["pagelab on the CPU"].runs
    assert rows["hf-generate"].runs
    assert "default model" not in rows
    bare = {
        **environment,
        "torch": None,
        "default_model": {"ready": False, "why": "not fetched yet"},
    }
    rows = {row.name: row for row in what_runs(bare)}
    assert not rows["pagelab on the CPU"].runs
    assert rows["hf-static"].why == "torch is not installed"
    assert rows["default model"].why == "not fetched yet"


@pytest.mark.parametrize(
    ("gpus", "torch", "runs", "why"),
    [
        ([], {"cuda": "13.0"}, False, "no NVIDIA driver"),
        ([{"name": "H100"}], {"cuda": None}, False, "built without CUDA"),
        ([{"name": "H100"}], {"cuda": "13.0", "cuda_available": False}, False, "no usable"),
        ([{"name": "H100"}], {"cuda": "13.0"}, True, "H100"),
    ],
)
def test_a_gpu_needs_a_driver_and_a_torch_built_for_it(
    environment: dict[str, Any], gpus: list[Any], torch: dict[str, Any], runs: bool, why: str
) -> None:
    changed = {
        **environment,
        "gpus": gpus,
        "torch": {"version": "2.13.0", "build": "cpu", **torch},
    }
    row = {row.name: row for row in what_runs(changed)}["torch on a GPU"]
    assert row.runs == runs
    assert why in row.why


class FakeNvml:
    """One card, two processes on it."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None:
        raise self.NVMLError

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"card {index}"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"H100"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        if self.broken:
            raise self.NVMLError
        return SimpleNamespace(total=80 << 30, free=79 << 30)

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        if self.broken:
            raise self.NVMLError
        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=5000),
            SimpleNamespace(pid=1, usedGpuMemory=7),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=None),  # the driver does not tell
        ]


def test_gpu_memory_is_that_of_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    (gpu,) = telemetry.gpus()
    assert gpu == {
        "index": 0,
        "name": "H100",
        "memory_total_bytes": 80 << 30,
        "memory_free_bytes": 79 << 30,
        "compute_capability": [9, 0],
    }
    with MemorySampler(os.getpid(), 0.01) as sampler:
        assert sampler.sample()[2] == 5000
    assert sampler.peak_device_bytes == 5000
    columns = sampler.columns()
    assert columns["device_bytes"] is not None
    assert set(columns["device_bytes"]) == {5000}
    assert "NVML" in columns["source"]


def test_a_card_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=True))
    assert telemetry.gpus() == []
    with MemorySampler(os.getpid(), 0.01) as sampler:
        assert sampler.sample()[2] is None
    assert sampler.columns()["device_bytes"] is None


def test_a_process_that_is_gone_has_no_memory() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert rss_bytes(child.pid) == 0
    assert telemetry.process_tree(child.pid) == []


def test_children_are_counted() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPER!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        parent.stdout.readline()
        assert rss_bytes(parent.pid) > rss_bytes(parent.pid, children=False) + (50 << 20)
    finally:
        for pid in reversed(telemetry.process_tree(parent.pid)):
            psutil.Process(pid).kill()
        parent.wait()
        parent.stdout.close()


def test_the_sampler_sees_a_peak_and_survives_the_end() -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with MemorySampler(child.pid, 0.01) as sampler:
        child.stdout.readline()
        time.sleep(0.1)
        t, rss, device = sampler.sample()
        child.kill()
        child.wait()
        time.sleep(0.05)
        assert sampler.sample()[1] == rss
    child.stdout.close()
    columns = sampler.columns()
    assert t > 0
    assert rss > 60 << 20
    assert device is None or device >= 0
    assert sampler.peak_rss_bytes is not None
    assert sampler.peak_rss_bytes >= rss
    assert len(columns["t"]) == len(columns["rss_bytes"]) > 3
    assert columns["t"] == sorted(columns["t"])
    assert min(columns["rss_bytes"]) > 0


@pytest.mark.parametrize(
    ("everyone", "ours", "expected"),
    [(20.0, 15.0, 0.5), (20.0, 20.0, 0.0), (10.0, 0.0, 0.0), (19.0, 20.0, 0.0)],
)
def test_other_load_counts_only_when_the_machine_was_full(
    monkeypatch: pytest.MonkeyPatch, everyone: float, ours: float, expected: float
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(memory, "_busy_seconds", lambda: 0.0)
    monkeypatch.setattr(memory, "_our_seconds", lambda: 0.0)
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    load = telemetry.OtherLoad()
    monkeypatch.setattr(memory, "_busy_seconds", lambda: everyone)
    monkeypatch.setattr(memory, "_our_seconds", lambda: ours)
    monkeypatch.setattr("time.monotonic", lambda: 110.0)
    assert load.cores() == pytest.approx(expected)


def test_a_long_series_is_thinned_and_keeps_its_peak() -> None:
    sampler = MemorySampler(1)
    sampler._t = [i / 100 for i in range(10_001)]
    sampler._rss = [1] * 10_001
    sampler._rss[7777] = 5
    sampler._device = [0] * 10_001
    columns = sampler.columns(limit=100)
    assert len(columns["t"]) <= 100
    assert columns["t"] == sorted(columns["t"])
    assert columns["rss_bytes"].count(5) == 1
    assert columns["t"][columns["rss_bytes"].index(5)] == 77.77


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps it on Linux only")
def test_the_kernels_peak_is_at_least_what_is_resident() -> None:
    peak = telemetry.own_peak_rss_bytes()
    assert peak is not None
    assert peak >= psutil.Process().memory_info().rss * 0.9
