"""The commands as a user types them: right answers, and one clear line for what cannot work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagelab.models.fetch import ModelSource
from tests.support.synthetic_results import make_results
from tests.support.tiny_models import tiny_gguf, tiny_model


def pagelab(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagelab", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_help_is_quick_and_names_every_command() -> None:
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        done = pagelab("--help")
        best = min(best, time.perf_counter() - start)
    assert done.returncode == 0
    for command in ("check", "compare", "generate", "report"):
        assert f"  {command}" in done.stdout
    assert best < 0.5


def test_check_prints_json_for_machines_and_a_table_for_people() -> None:
    facts = json.loads(pagelab("check", "--json").stdout)
    assert facts["python"]["version"] == sys.version.split()[0]
    assert facts["cpu"]["cores"] >= 1
    table = pagelab("check").stdout
    assert "What runs here" in table
    assert "hf-generate" in table


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_generate_continues_a_prompt(kind: str) -> None:
    model = str(tiny_model("llama") if kind == "folder" else tiny_gguf("llama"))
    done = pagelab("generate", "ab", "--model", model, "--max-tokens", "5", "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert "[2 tokens in, 5 out (length)" in done.stderr


def test_generate_reads_standard_input_and_prints_several_samples() -> None:
    model = str(tiny_model("gpt2"))
    done = pagelab(
        "generate",
        "-",
        "--model",
        model,
        "-n",
        "2",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--max-tokens",
        "3",
        stdin="hello",
    )
    assert done.returncode == 0, done.stderr
    assert "── 'hello' #0" in done.stdout
    assert "── 'hello' #1" in done.stdout
    assert (
        done.stdout
        == pagelab(
            "generate",
            "hello",
            "--model",
            model,
            "-n",
            "2",
            "--temperature",
            "1",
            "--seed",
            "3",
            "--max-tokens",
            "3",
        ).stdout
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the prompt is empty"),
        (["x", "--temperature", "nan"], "temperature must be at least 0 and finite"),
        (["x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["x", "--max-tokens", "9999"], "raise --max-model-len"),
        (["x", "--kv-memory", "1"], "raise --kv-memory"),
        (["x", "--kv-memory", "lots"], "not a size in bytes"),
        (["x", "--block-size", "0"], "block_size must be"),
        (["x", "--allocator", "best"], "choose one of contiguous-max, contiguous-pow2"),
        (["x", "--attention", "best"], "choose auto or one of"),
        (["x", "--device", "tpu"], "use cpu, cuda"),
        (["x", "--max-model-len", "9999"], "lower --max-model-len"),
        (["x", "--threads", "0"], "threads must be at least 1"),
        (["x", "--no-such-option"], "No such option"),
        (["x", "--system", "s"], "--system needs --chat"),
        (["x", "--model", "./nowhere"], "no such folder or file"),
    ],
)
def test_what_cannot_work_is_one_clear_line(words: list[str], message: str) -> None:
    if "--model" not in words:
        words = [*words, "--model", str(tiny_model("llama"))]
    done = pagelab("generate", *words)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_report_is_rendered_again(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(make_results()))
    done = pagelab("report", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size > 500_000
    assert "pagelab paged" in done.stdout


def test_report_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    done = pagelab("report", str(tmp_path / "results.json"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not a results file" in done.stderr


@pytest.mark.default_model
def test_the_default_model_answers(default_model: ModelSource) -> None:
    done = pagelab("generate", "The capital of France is", "--max-tokens", "3")
    assert done.stdout.strip().startswith("Paris")
    chat = pagelab("generate", "--chat", "What is the capital of France?", "--max-tokens", "20")
    assert "Paris" in chat.stdout
