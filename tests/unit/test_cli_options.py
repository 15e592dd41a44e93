"""Lists in options: what they read, and that what they refuse names the option."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from pagelab.cli.options import grid_options, rates, workload_options
from pagelab.config import parse_share
from pagelab.errors import ConfigError


def read(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    @click.command()
    @grid_options
    @workload_options
    def command(**options: Any) -> None:
        found.update(options)

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found


def test_lists_are_parted_by_commas() -> None:
    found = read(
        "--kv-memory=64MiB, 1GiB",
        "--block-size=1,256",
        "--watermark=0,5%,.1",
        "--placement=buddy,first-fit",
        "--workload=seed,uniform:in=1..2,out=3,n=4,x.csv",
        "--rate=burst,gamma:4,cv=2,trace:2",
    )
    assert found["kv_memories"] == (64 << 20, 1 << 30)
    assert found["block_sizes"] == (1, 256)
    assert found["watermarks"] == (0.0, 0.05, 0.1)
    assert found["placements"] == ("buddy", "first-fit")
    assert found["workloads"] == ("seed", "uniform:in=1..2,out=3,n=4", "x.csv")
    assert found["rates"] == ("burst", "gamma:4,cv=2", "trace:2")


def test_what_is_not_given_is_left_to_the_defaults() -> None:
    found = read()
    several = ("kv_memories", "block_sizes", "watermarks", "placements", "workloads", "rates")
    assert [found[name] for name in several] == [None] * 6
    assert found["too_long"] == "error"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--kv-memory=64MiB,lots", "--kv-memory: not a size in bytes: 'lots'"),
        ("--kv-memory=-1", "--kv-memory: not a size"),
        ("--block-size=8,x", "--block-size: not a whole number: 'x'"),
        ("--block-size=1.5", "--block-size: not a whole number"),
        ("--watermark=half", "--watermark: not a share: 'half'"),
        ("--watermark=nan", "--watermark: not a share"),
        ("--rate=,", "--rate is empty"),
    ],
)
def test_a_value_that_cannot_be_read_names_its_option(argument: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(argument)


def test_a_lonely_cv_is_left_for_the_rate_to_refuse() -> None:
    context, parameter = click.Context(click.Command("x")), click.Option(["--rate"])
    assert rates(context, parameter, "4,cv=2") == ("4", "cv=2")


@pytest.mark.parametrize(("text", "share"), [("0.05", 0.05), ("5%", 0.05), ("0", 0), ("150%", 1.5)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)
