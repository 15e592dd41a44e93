"""What an experiment is asked to do, checked before anything runs."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pagelab.config import format_bytes
from pagelab.errors import ConfigError
from pagelab.lab.methods import DEFAULT_ALLOCATORS, DEFAULT_METHODS, check_methods
from pagelab.memory.placement import PLACEMENTS
from pagelab.results import Objectives
from pagelab.workloads import KINDS, ShapeOptions
from pagelab.workloads.shapes import TooLong

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
DTYPES = ("float32", "bfloat16", "float16")
AXES = ("budget", "batch")
MAX_BLOCK_SIZE = 256
DEFAULT_MAX_MODEL_LEN = 2048
DEFAULT_WORKLOADS = ("prompts", "mixed")
DEFAULT_OBJECTIVES = "ttft=2,tpot=0.2"
DEFAULT_OUT = Path("pagelab-results")


def parse_objectives(text: str) -> Objectives:
    """Read `ttft=2,tpot=0.2,e2e=30` (seconds), or `none`.

    Raises:
        ConfigError: it is not of that form, or names an objective twice.
    """
    found: dict[str, float] = {}
    for part in [] if text.strip() == "none" else text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        known = name in ("ttft", "tpot", "e2e") and name not in found
        if not known or not 0 < seconds < math.inf:
            raise ConfigError(
                f"cannot read {part.strip()!r} in --objective {text!r}: it takes seconds for "
                "ttft, tpot and e2e, as in ttft=2,tpot=0.2,e2e=30, or none"
            )
        found[name] = seconds
    return {
        "ttft_s": found.get("ttft"),
        "tpot_s": found.get("tpot"),
        "e2e_s": found.get("e2e"),
    }


def format_objectives(objectives: Objectives) -> str:
    """What `parse_objectives` reads."""
    limits = {
        "ttft": objectives["ttft_s"],
        "tpot": objectives["tpot_s"],
        "e2e": objectives["e2e_s"],
    }
    stated = [f"{name}={value:g}" for name, value in limits.items() if value is not None]
    return ",".join(stated) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentSettings:
    """One experiment: every method in every cell of the grid, on every workload.

    Where several values are given, every combination is a run of its own; the first of each
    makes the base cell (`pagelab.lab.grid`).

    Attributes:
        model: None for the default model; a folder, a `.gguf` file or a hub id.
        workloads: what `pagelab.workloads.load_workload` takes, in order.
        rates: how requests arrive (`pagelab.workloads.arrivals`); each makes workloads of its
            own. Empty: the workload's own way.
        num_requests: of each workload; None: as many as it has.
        too_long: what happens to a request that is longer than the maximum length: `error`,
            `drop`, `clip`.
        skip_bad: leave malformed lines of a trace out, and count them.
        asked_tokens: the `max_tokens` of every client, for allocators that reserve it.
        methods: names (`pagelab.lab.methods.METHODS`), or `module:Class`.
        allocators: of the method `pagelab`: names, `module:Class` or `file.py:Class`.
        kv_memories: bytes for K/V, the same for all methods; None: enough for two requests of
            the maximum length, so that memory is the limit for those who reserve it.
        block_sizes: slots a block, 1 to 256.
        watermarks: share of the blocks that an admission must leave free.
        placements: where contiguous ranges go: `buddy`, `first-fit`.
        axes: `budget`: the same bytes for all; `batch`: the same number of requests at once.
        batch: that number; None: what `contiguous-max` holds in the base cell.
        max_model_len: tokens a request may reach; None: 2,048, or the model's own where less.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`, the same for all methods.
        dtype: of weights, activations and K/V, the same for all methods.
        temperature: 0 is greedy; above, equality of tokens is not compared.
        objectives: what goodput counts.
        repeats: runs of each row, each in a process of its own.
        seed: of generated workloads and of sampling.
        threads: CPU threads of each method; None: the physical cores given to this process.
        max_num_batched_tokens: the token budget of a step.
        out: folder for `results.json`, `ledger.jsonl`, the report and the logs.
        silence_timeout_s: a method that reports nothing for so long is stopped.
        command: the command line that repeats it, for the report; None: made from the above.
        debug: tracebacks of expected errors, too, go to the methods' logs.

    Raises:
        ConfigError: a value that cannot work; names the option.
    """

    model: str | None = None
    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    rates: tuple[str, ...] = ()
    num_requests: int | None = None
    too_long: TooLong = "error"
    skip_bad: bool = False
    asked_tokens: int | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS
    allocators: tuple[str, ...] = DEFAULT_ALLOCATORS
    kv_memories: tuple[int, ...] | None = None
    block_sizes: tuple[int, ...] = (16,)
    watermarks: tuple[float, ...] = (0.05,)
    placements: tuple[str, ...] = ("buddy",)
    axes: tuple[str, ...] = AXES
    batch: int | None = None
    max_model_len: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    temperature: float = 0.0
    objectives: Objectives = field(default_factory=lambda: parse_objectives(DEFAULT_OBJECTIVES))
    repeats: int = 1
    seed: int = 0
    threads: int | None = None
    max_num_batched_tokens: int = 512
    out: Path = DEFAULT_OUT
    silence_timeout_s: float = 900.0
    command: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        _check_list("--workload", self.workloads, KINDS)
        check_methods(self.methods)
        if "pagelab" in self.methods:
            _check_list("--allocators", self.allocators, "one at least")
        _check_list("--axes", self.axes, ", ".join(AXES))
        _check_choices("--axes", self.axes, AXES)
        _check_list("--placement", self.placements, ", ".join(PLACEMENTS))
        _check_choices("--placement", self.placements, tuple(PLACEMENTS))
        _check_list("--kv-memory", self.kv_memories, "a size such as 256MiB")
        _check_list("--block-size", self.block_sizes, f"1 to {MAX_BLOCK_SIZE}")
        _check_list("--watermark", self.watermarks, "shares such as 0.05")
        _check_list("--rate", self.rates or None, "a rate")
        if DEVICE.fullmatch(self.device) is None:
            raise ConfigError(f"no device {self.device!r}: --device takes auto, cpu, cuda, cuda:N")
        if self.dtype not in DTYPES:
            raise ConfigError(f"no dtype {self.dtype!r}: --dtype takes {', '.join(DTYPES)}")
        for size in self.block_sizes:
            _check_whole("--block-size", size, most=MAX_BLOCK_SIZE)
        for memory in self.kv_memories or ():
            _check_whole("--kv-memory", memory)
        for watermark in self.watermarks:
            if not 0 <= watermark < 1:
                raise ConfigError(f"--watermark must be from 0 to below 1, not {watermark}")
        for option, value in (
            ("--repeats", self.repeats),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--max-model-len", self.max_model_len),
            ("--threads", self.threads),
            ("--batch", self.batch),
        ):
            if value is not None:
                _check_whole(option, value)
        if self.batch is not None and "batch" not in self.axes:
            raise ConfigError("--batch is the size of the same-batch axis: add batch to --axes")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature must be 0 or more, not {self.temperature}")
        if not self.silence_timeout_s > 0:
            raise ConfigError("the timeout of a silent method must be positive")
        for rate in self.rates or (None,):
            self.shape_options(rate, None)  # checks what it is made of

    def shape_options(self, rate: str | None, max_model_len: int | None) -> ShapeOptions:
        """What is taken of each workload.

        Raises:
            ConfigError: a value that cannot work; names the option.
        """
        return ShapeOptions(
            num_requests=self.num_requests,
            rate=rate,
            max_model_len=max_model_len,
            too_long=self.too_long,
            skip_bad=self.skip_bad,
            asked_tokens=self.asked_tokens,
        )

    @property
    def sampling(self) -> str:
        """For people."""
        if self.temperature == 0:
            return "greedy, end-of-sequence ignored"
        return f"temperature {self.temperature:g}, seed {self.seed}, end-of-sequence ignored"

    def command_line(self) -> str:
        """The command that repeats this experiment: options that are not the defaults."""
        if self.command is not None:
            return self.command
        usual = ExperimentSettings()._options()
        words = ["pagelab", "compare"]
        for option, value in self._options().items():
            if value == usual[option]:
                continue
            words += [option] if value is True else [option, str(value)]
        return shlex.join(words)

    def _options(self) -> dict[str, object]:
        """Every option that changes the outcome, as it would be written."""

        def joined(values: Sequence[object] | None) -> str | None:
            return ",".join(str(value) for value in values) if values else None

        return {
            "--model": self.model,
            "--workload": joined(self.workloads),
            "--rate": joined(self.rates),
            "--requests": self.num_requests,
            "--too-long": self.too_long,
            "--skip-bad": self.skip_bad,
            "--asked-tokens": self.asked_tokens,
            "--methods": joined(self.methods),
            "--allocators": joined(self.allocators),
            "--kv-memory": joined(self.kv_memories),
            "--block-size": joined(self.block_sizes),
            "--watermark": joined(self.watermarks),
            "--placement": joined(self.placements),
            "--axes": joined(self.axes),
            "--batch": self.batch,
            "--max-model-len": self.max_model_len,
            "--device": self.device,
            "--dtype": self.dtype,
            "--temperature": self.temperature,
            "--objective": format_objectives(self.objectives),
            "--repeats": self.repeats,
            "--seed": self.seed,
            "--threads": self.threads,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
        }


def _check_list(option: str, values: Sequence[object] | None, takes: str) -> None:
    if values is None:
        return
    if not values:
        raise ConfigError(f"{option} is empty: it takes {takes}")
    twice = next((value for value in values if list(values).count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{option} names {twice} twice")


def _check_choices(option: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise ConfigError(f"{option} takes {', '.join(choices)}, not {value!r}")


def _check_whole(option: str, value: int, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        limit = "at least 1" if most is None else f"from 1 to {most}"
        raise ConfigError(f"{option} must be {limit}, not {value}")


def default_kv_memory(max_model_len: int, bytes_per_token: int) -> int:
    """Two requests of the maximum length, an eighth of one more, in whole 16 MiB where large.

    The eighth covers the watermark and the rounding to blocks, so that a method which reserves
    the maximum length runs exactly two requests.
    """
    wanted = max_model_len * bytes_per_token * 17 // 8
    unit = 16 << 20
    return -(-wanted // unit) * unit if wanted > unit else wanted


def check_max_model_len(asked: int | None, own: int) -> int:
    """The length in use, from the option and the model's own maximum.

    Raises:
        ConfigError: more than the model has.
    """
    if asked is None:
        return min(DEFAULT_MAX_MODEL_LEN, own)
    if asked > own:
        raise ConfigError(f"--max-model-len {asked} is more than the model's own {own}: lower it")
    return asked


def check_length(longest: int, max_model_len: int, request: str) -> None:
    """Refuse a request that is longer than the maximum length.

    Raises:
        ConfigError: with the figures.
    """
    if longest > max_model_len:
        raise ConfigError(
            f"{request} has {longest} tokens with its output, more than --max-model-len "
            f"{max_model_len}: raise it, choose another --workload, or say --too-long drop|clip"
        )


def check_budget(kv_memory: int, bytes_per_token: int, longest: int, request: str) -> None:
    """Refuse a budget in which the longest request could not run even alone.

    Raises:
        ConfigError: with the figures.
    """
    slots = kv_memory // bytes_per_token
    if longest > slots:
        raise ConfigError(
            f"--kv-memory of {format_bytes(kv_memory)} holds {slots} tokens, and {request} needs "
            f"{longest}: raise it to at least {format_bytes(longest * bytes_per_token)}"
        )
