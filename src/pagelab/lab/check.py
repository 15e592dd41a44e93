"""`pagelab check`: the environment, and what will run here and what will not."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagelab.attention.select import why_no_triton_on
from pagelab.config import format_bytes
from pagelab.models.fetch import default_model_status, model_cache
from pagelab.native.library import instruction_sets, native, why_no_native
from pagelab.telemetry import Capability, describe_environment, what_runs


def check_environment(*, probe_torch: bool = True) -> dict[str, Any]:
    """Everything that `pagelab check --json` prints; `runs` lists what runs and what does not.

    Asking torch itself (`probe_torch`) takes some seconds. Nothing is fetched.
    """
    environment = describe_environment(model_cache(), probe_torch=probe_torch)
    ready, why = default_model_status()
    environment["default_model"] = {"ready": ready, "why": why}
    runs = [*what_runs(environment), compiled_extension(), attention_backend(environment)]
    environment["runs"] = [capability._asdict() for capability in runs]
    return environment


def render_check(environment: dict[str, Any], console: Console) -> None:
    """Print what `check_environment` gave, as two tables."""
    facts = Table(title="This machine", title_justify="left", show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in environment_rows(environment):
        facts.add_row(name, escape(text))
    console.print(facts)
    console.print()
    table = Table(title="What runs here", title_justify="left", box=None)
    for heading in ("", "", "why"):
        table.add_column(heading, overflow="fold")
    for row in environment["runs"]:
        capability = Capability(**row)
        mark = "[green]yes[/]" if capability.runs else "[yellow]no[/]"
        table.add_row(f"[bold]{escape(capability.name)}[/]", mark, escape(capability.why))
    console.print(table)


def compiled_extension() -> Capability:
    """Whether the extension for CPUs runs here, and by which instruction set."""
    reason, found = why_no_native(), native()
    if found is None:
        return Capability("compiled extension", False, f"{reason}; torch's operations instead")
    sets = ", ".join(instruction_sets())
    return Capability("compiled extension", True, f"{found.name} (here are {sets})")


def attention_backend(environment: dict[str, Any]) -> Capability:
    """Whether the Triton kernels run here, what `--attention auto` takes, and why.

    Torch's first GPU decides, which `--device auto` takes; NVML numbers them alike unless
    CUDA_VISIBLE_DEVICES says otherwise.
    """
    usable = next(c for c in what_runs(environment) if c.name == "torch on a GPU")
    if not usable.runs:
        reason: str | None = usable.why
    else:
        capability = environment["gpus"][0].get("compute_capability")
        reason = why_no_triton_on(tuple(capability)) if capability else None
    backend = "triton" if reason is None else "cpu"
    if not usable.runs and native() is not None:
        backend = "native"
    text = f"--attention auto takes {backend}"
    return Capability("attention triton", reason is None, text + (f": {reason}" if reason else ""))


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The environment as (name, text) rows."""
    system, python, cpu = environment["os"], environment["python"], environment["cpu"]
    memory, packages = environment["memory"], environment["packages"]
    rows = [
        ("PageLab", environment["pagelab"] or "not installed as a package"),
        ("system", f"{system['name']} ({system['release']}, {system['machine']})"),
        ("Python", f"{python['version']} ({python['implementation']}) at {python['executable']}"),
        ("environment", python["virtual_env"] or "no virtual environment"),
        ("torch", _torch_text(environment["torch"])),
        *((name, packages[name] or "not installed") for name in ("transformers", "vllm")),
        (
            "processor",
            f"{cpu['model']}: {cpu['cores']} cores for this process "
            f"(of {cpu['physical_cores']}, {cpu['logical_cores']} hardware threads)",
        ),
        ("instructions", ", ".join(cpu["instruction_sets"]) or "no vector sets known"),
        (
            "memory",
            f"{format_bytes(memory['available_bytes'])} available of "
            f"{format_bytes(memory['total_bytes'])}"
            + (" (container's limit)" if memory["limit_bytes"] is not None else ""),
        ),
    ]
    for gpu in environment["gpus"]:
        free, total = gpu["memory_free_bytes"], gpu["memory_total_bytes"]
        text = f"{gpu['name']}: {format_bytes(free)} free of {format_bytes(total)}"
        if gpu.get("compute_capability"):
            text += f", compute capability {'.'.join(map(str, gpu['compute_capability']))}"
        rows.append((f"GPU {gpu['index']}", text))
    if not environment["gpus"]:
        rows.append(("GPU", "none found"))
    cache = environment.get("model_cache")
    if cache is not None:
        state = format_bytes(cache["bytes"]) if cache["exists"] else "empty"
        rows.append(("model cache", f"{cache['path']} ({state})"))
    return rows


def _torch_text(torch: dict[str, Any] | None) -> str:
    if torch is None:
        return "not installed"
    if "error" in torch:
        return f"{torch['version']}, which does not work: {torch['error']}"
    cuda = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"
    if "cuda_available" in torch:
        cuda += ", CUDA usable" if torch["cuda_available"] else ", CUDA not usable"
    details = [f"build {torch['build']}", cuda]
    if "cpu_capability" in torch:
        details.append(f"CPU kernels for {torch['cpu_capability']}")
    return f"{torch['version']} ({', '.join(details)})"
