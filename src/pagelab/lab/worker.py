"""The child's main loop: `python -m pagelab.lab.worker`, a job on stdin, events on stdout."""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import importlib  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402

from pagelab.errors import ConfigError, InsufficientMemoryError, PageLabError  # noqa: E402
from pagelab.lab.methods import method_path  # noqa: E402
from pagelab.lab.methods.base import Method, Reporter  # noqa: E402
from pagelab.lab.protocol import (  # noqa: E402
    EXIT_BAD_JOB,
    EXIT_FAILED,
    EXIT_UNAVAILABLE,
    PROTOCOL,
    Channel,
    Job,
    MethodUnavailableError,
    Parent,
    take_stdout,
)
from pagelab.telemetry import own_peak_rss_bytes, package_version  # noqa: E402


def main() -> int:
    """Run one job; returns the exit code."""
    channel = take_stdout()
    parent = Parent()
    try:
        job = Job.from_line(parent.read_line())
    except ValueError as error:
        return _fail(channel, f"the job cannot be read: {error}", EXIT_BAD_JOB)
    parent.watch()
    try:
        _run(job, channel, parent)
    except (MethodUnavailableError, InsufficientMemoryError) as error:
        parent.finished()
        channel.send({"event": "error", "kind": "unavailable", "message": str(error)})
        return EXIT_UNAVAILABLE
    except PageLabError as error:
        if job.debug:
            traceback.print_exc()
        return _fail(channel, str(error))
    except MemoryError:
        traceback.print_exc()
        return _fail(channel, "out of memory: lower --kv-memory, or use a smaller model or --dtype")
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            traceback.print_exc()
            return _fail(
                channel,
                "out of GPU memory: lower --kv-memory or --max-num-batched-tokens, or use a "
                "smaller model or --dtype",
            )
        traceback.print_exc()
        return _fail(channel, f"{type(error).__name__}: {error}")
    return 0


def _run(job: Job, channel: Channel, parent: Parent) -> None:
    reporter = Reporter(channel)
    channel.send(
        {"event": "hello", "protocol": PROTOCOL, "pid": os.getpid(), "versions": _versions()}
    )
    reporter.stage("start")
    method = _load(job, reporter)
    imported = time.perf_counter()
    capacity = method.setup()
    loaded = time.perf_counter()
    channel.send({"event": "kv", "capacity": capacity})
    _stage(method, "model loaded")
    warming = time.perf_counter()
    with reporter.muted():
        method.warm_up()
    warm = time.perf_counter()
    _stage(method, "warmed up")
    for workload in job.workloads:
        channel.send({"event": "workload", "run": method.run(workload)})
    parent.finished()
    channel.send(
        {
            "event": "done",
            "startup": {
                "import_s": imported - _STARTED,
                "load_s": loaded - imported,
                "warmup_s": warm - warming,
            },
            "peak_rss_bytes": own_peak_rss_bytes(),
        }
    )


def _load(job: Job, reporter: Reporter) -> Method:
    module_name, class_name = method_path(job.method)
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise MethodUnavailableError(
            f"{job.method} needs what is not installed: {error}"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{module_name} has no {class_name}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"{job.method} is not a pagelab.lab.methods.base.Method")
    return found(job, reporter)


def _stage(method: Method, label: str) -> None:
    allocated, live = method.kv_bytes()
    method.reporter.stage(label, kv_allocated_bytes=allocated, kv_live_bytes=live)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("pagelab", "torch", "transformers"):
        version = package_version(name)
        if version is not None:
            versions[name] = version
    return versions


def _fail(channel: Channel, message: str, code: int = EXIT_FAILED) -> int:
    channel.send({"event": "error", "kind": "failed", "message": message})
    return code


if __name__ == "__main__":
    sys.exit(main())
