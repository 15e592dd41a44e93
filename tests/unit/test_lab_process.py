"""One method in a process of its own: what it says, prints, and how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pagelab.lab.events import Event, ProgressMade, StageReached, WorkloadFinished
from pagelab.lab.methods import METHODS, Variant, method_path
from pagelab.lab.process import WORKER, log_tail, run_method
from pagelab.lab.protocol import PROTOCOL, Channel, Job, parse_event
from pagelab.results import MethodRun, Startup
from pagelab.workloads import Workload, WorkloadRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def workload(name: str, count: int = 2, tokens: int = 4) -> Workload:
    requests = tuple(
        WorkloadRequest(id=f"{name}-{i}", prompt_token_ids=(i + 1, 2), max_tokens=tokens)
        for i in range(count)
    )
    return Workload(name, "", requests)


def job(method: str) -> Job:
    return Job(
        method=method,
        allocator=None,
        model=None,
        dtype="float32",
        kv_memory=1 << 20,
        block_size=16,
        max_model_len=64,
        max_num_batched_tokens=64,
        watermark=0.05,
        threads=1,
        seed=0,
        warm_up=workload("warm-up"),
        workloads=(workload("first"), workload("second")),
    )


def run(
    fake: str,
    tmp_path: Path,
    events: list[Event] | None = None,
    *,
    silence_timeout_s: float = 30.0,
    command: tuple[str, ...] = WORKER,
) -> MethodRun:
    method = f"tests.unit.test_lab_fakes:{fake}"
    return run_method(
        job(method),
        Variant(method, None, fake, "traditional"),
        0,
        log_path=tmp_path / "logs" / "method.log",
        on_event=(events if events is not None else []).append,
        silence_timeout_s=silence_timeout_s,
        sample_every_s=0.01,
        command=command,
    )


def names(method_run: MethodRun) -> list[str]:
    return [entry["name"] for entry in method_run["workloads"]]


def test_an_honest_method_is_recorded_whole(tmp_path: Path) -> None:
    events: list[Event] = []
    result = run("Honest", tmp_path, events)
    assert (result["status"], result["reason"]) == ("ok", None)
    assert names(result) == ["first", "second"]
    assert [r["output_token_ids"] for r in result["workloads"][0]["requests"]] == [[1] * 4, [2] * 4]
    assert [s["label"] for s in result["snapshots"]] == [
        "start",
        "model loaded",
        "warmed up",
        "first: request 1 done",
        "first: request 2 done",
        "second: request 1 done",
        "second: request 2 done",
    ]
    assert all(s["rss_bytes"] > 1 << 20 for s in result["snapshots"])
    assert result["snapshots"][3]["kv_allocated_bytes"] == 40
    times = [s["t"] for s in result["snapshots"]]
    assert times == sorted(times)
    assert result["kv"] is not None
    assert result["kv"]["slots"] == 1000
    assert result["startup"] is not None
    assert set(result["startup"]) == {"import_s", "load_s", "warmup_s"}
    memory = result["memory"]
    assert memory is not None
    assert len(memory["t"]) == len(memory["rss_bytes"]) > 0
    assert result["peak_rss_bytes"] is not None
    assert result["peak_rss_bytes"] >= max(memory["rss_bytes"])
    done = [e.done for e in events if isinstance(e, ProgressMade) and e.workload == "second"]
    assert done[-1] == 8
    assert sum(isinstance(e, WorkloadFinished) for e in events) == 2
    assert sum(isinstance(e, StageReached) for e in events) == 7
    assert not psutil.pid_exists(result["pid"] or -1)


def test_prints_and_broken_lines_do_not_reach_the_protocol(tmp_path: Path) -> None:
    result = run("Noisy", tmp_path)
    assert result["status"] == "ok"
    log = (tmp_path / "logs" / "method.log").read_text()
    assert "a library greets you" in log
    assert "{not an event" in log


def test_lines_that_are_no_events_are_kept_in_the_log(tmp_path: Path) -> None:
    code = "import sys; print('hello'); print('{\"event\": \"nonsense\"}')"
    result = run("Honest", tmp_path, command=(sys.executable, "-c", code))
    assert result["status"] == "failed"
    assert "exit code 0" in str(result["reason"])
    log = (tmp_path / "logs" / "method.log").read_text()
    assert log.count("[not an event") == 2


def test_a_method_that_cannot_run_here_says_why(tmp_path: Path) -> None:
    result = run("Unavailable", tmp_path)
    assert result["status"] == "unavailable"
    assert result["reason"] == "needs a flux capacitor: raise --kv-memory"


def test_an_error_keeps_the_workloads_before_it_and_shows_no_traceback(tmp_path: Path) -> None:
    result = run("Raises", tmp_path)
    assert result["status"] == "failed"
    assert result["reason"] == "RuntimeError: the tensors are of the wrong shape"
    assert names(result) == ["first"]
    assert "Traceback" in (tmp_path / "logs" / "method.log").read_text()


def test_a_killed_method_names_the_signal_and_its_last_words(tmp_path: Path) -> None:
    result = run("Dies", tmp_path)
    assert result["status"] == "failed"
    reason = str(result["reason"])
    assert "SIGKILL" in reason
    assert "memory runs out" in reason
    assert "the last words" in reason
    assert names(result) == ["first"]


def test_a_method_that_exits_without_a_word_shows_the_end_of_its_log(tmp_path: Path) -> None:
    result = run("Exits", tmp_path)
    assert result["status"] == "failed"
    assert "exit code 7" in str(result["reason"])
    assert "a library gave up" in str(result["reason"])


def test_running_out_of_memory_names_the_knobs(tmp_path: Path) -> None:
    result = run("RunsOut", tmp_path)
    assert result["status"] == "failed"
    assert "--kv-memory" in str(result["reason"])


def test_a_silent_method_is_stopped_and_keeps_what_it_finished(tmp_path: Path) -> None:
    started = time.monotonic()
    result = run("Hangs", tmp_path, silence_timeout_s=2.0)
    assert time.monotonic() - started < 15
    assert (result["status"], result["reason"]) == ("failed", "silent for 2 s: stopped")
    assert names(result) == ["first"]
    assert not psutil.pid_exists(result["pid"] or -1)


def test_figures_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    result = run("Lies", tmp_path)
    assert result["status"] == "failed"
    assert "the ledger is not the pool of 1000" in str(result["reason"])
    assert result["workloads"] == []


def test_a_method_of_another_protocol_is_refused(tmp_path: Path) -> None:
    hello = {"event": "hello", "protocol": PROTOCOL + 1, "pid": 1, "versions": {}}
    result = run(
        "Honest", tmp_path, command=(sys.executable, "-c", f"print({json.dumps(hello)!r})")
    )
    assert result["status"] == "failed"
    assert "protocol" in str(result["reason"])


def test_a_class_that_is_not_there_or_no_method_is_an_error(tmp_path: Path) -> None:
    assert "has no Nothing" in str(run("Nothing", tmp_path)["reason"])
    assert "is not a" in str(run("POOL", tmp_path)["reason"])


def test_the_child_ends_when_its_parent_is_gone() -> None:
    child = subprocess.Popen(
        WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdin.write(job("tests.unit.test_lab_fakes:Hangs").to_line())
    child.stdin.flush()
    for line in child.stdout:
        if json.loads(line)["event"] == "workload":
            break
    child.stdin.close()  # as the kernel does for a parent that was killed
    assert child.wait(10) == 4
    child.stdout.close()
    child.stderr.close()


def test_a_broken_job_is_told_apart() -> None:
    done = subprocess.run(WORKER, input='{"no": "job"}\n', capture_output=True, text=True)
    assert done.returncode == 2
    assert json.loads(done.stdout)["kind"] == "failed"


def test_a_job_survives_its_line() -> None:
    assert Job.from_line(job("hf-static").to_line()) == job("hf-static")


def test_nan_is_no_figure() -> None:
    channel = Channel(io.StringIO())
    startup: Startup = {"import_s": 0.0, "load_s": float("nan"), "warmup_s": 0.0}
    with pytest.raises(ValueError, match="not JSON compliant"):
        channel.send({"event": "done", "startup": startup, "peak_rss_bytes": None})


def test_an_event_that_is_incomplete_names_the_field() -> None:
    with pytest.raises(ValueError, match="done"):
        parse_event('{"event": "progress", "workload": "w", "done": "many", "total": 3}')


def test_every_method_that_is_named_can_be_found() -> None:
    for name in METHODS:
        module, _ = method_path(name)
        assert (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").is_file()


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("\n".join(map(str, range(100))) + "\n")
    assert log_tail(path, 3) == "97\n98\n99"
    assert log_tail(tmp_path / "nothing") == ""


def test_the_parent_imports_no_torch() -> None:
    code = (
        "import sys, pagelab.lab.process, pagelab.lab.worker, pagelab.lab.progress;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]", done.stderr
