"""Results files: written whole or not at all, validated when read, described by a schema."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from pagelab.errors import ReportError
from pagelab.results import load_results, save_results, schema, write_text_safely
from tests.support.synthetic_results import make_results

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "results-schema.json"


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    results = make_results()
    save_results(results, tmp_path / "deep" / "results.json")
    again = load_results(tmp_path / "deep" / "results.json")
    assert json.loads(json.dumps(results)) == json.loads(json.dumps(again))


def test_the_documented_schema_is_the_one_in_the_code_and_accepts_results(tmp_path: Path) -> None:
    documented = json.loads(SCHEMA_FILE.read_text())
    assert documented == schema(), "run: python -m pagelab.results > docs/results-schema.json"
    save_results(make_results(), tmp_path / "r.json")
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), documented)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a results file"),
        ('{"schema": "other"}', "not a results file"),
        ('{"schema": "pagelab.results", "version": 99}', "version 99"),
        ('{"schema": "pagelab.results", "version": 1}', "version 1 of the results schema"),
        ('{"schema": "pagelab.results", "version": 2}', "damaged at created"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        load_results(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"cannot read .*nowhere.json: No such file"):
        load_results(tmp_path / "nowhere.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_text_safely(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ReportError, match=r"cannot write .*report.html: No space left"):
        write_text_safely(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_file_that_may_not_grow_is_an_error_that_names_it(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from pagelab.errors import ReportError
from pagelab.results import write_text_safely
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text_safely(Path({str(tmp_path / "r.html")!r}), "x" * 100_000)
except ReportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"cannot write {tmp_path / 'r.html'}: File too large"
    assert list(tmp_path.iterdir()) == []
