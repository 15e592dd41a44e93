"""What an experiment is asked to do, checked before anything runs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pagelab.config import format_bytes
from pagelab.errors import ConfigError
from pagelab.lab.methods import DEFAULT_ALLOCATORS, DEFAULT_METHODS, variants
from pagelab.workloads import WORKLOADS

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MAX_MODEL_LEN = 2048
DEFAULT_WORKLOADS = ("prompts", "mixed")
DEFAULT_OUT = Path("pagelab-results")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentSettings:
    """One experiment: every method on every workload, `repeats` times.

    Attributes:
        model: None for the default model; a folder, a `.gguf` file or a hub id.
        workloads: names (`pagelab.workloads.WORKLOADS`), in order.
        methods: names (`pagelab.lab.methods.METHODS`), or `module:Class`.
        allocators: of the method `pagelab`.
        kv_memory: bytes for K/V, the same for all methods; None: enough for two requests of the
            maximum length, so that memory is the limit for those who reserve it.
        block_size: slots a block.
        max_model_len: tokens a request may reach; None: 2,048, or the model's own where less.
        dtype: of weights, activations and K/V, the same for all methods.
        repeats: runs of each method, each in a process of its own.
        seed: of generated workloads.
        threads: CPU threads of each method; None: the physical cores given to this process.
        watermark: share of the blocks that an admission must leave free.
        max_num_batched_tokens: the token budget of a step.
        out: folder for `results.json`, the report and the logs.
        silence_timeout_s: a method that reports nothing for so long is stopped.
        command: the command line that repeats it, for the report; None: made from the above.
        debug: tracebacks of expected errors, too, go to the methods' logs.

    Raises:
        ConfigError: a value that cannot work; names the option.
    """

    model: str | None = None
    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    methods: tuple[str, ...] = DEFAULT_METHODS
    allocators: tuple[str, ...] = DEFAULT_ALLOCATORS
    kv_memory: int | None = None
    block_size: int = 16
    max_model_len: int | None = None
    dtype: str = "float32"
    repeats: int = 1
    seed: int = 0
    threads: int | None = None
    watermark: float = 0.05
    max_num_batched_tokens: int = 512
    out: Path = DEFAULT_OUT
    silence_timeout_s: float = 900.0
    command: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.workloads:
            raise ConfigError(f"--workload is empty: name one of {', '.join(WORKLOADS)}")
        if len(set(self.workloads)) < len(self.workloads):
            raise ConfigError("--workload names a workload twice")
        unknown = [name for name in self.workloads if name not in WORKLOADS]
        if unknown:
            raise ConfigError(
                f"no workload {unknown[0]!r}: --workload takes {', '.join(WORKLOADS)}"
            )
        variants(self.methods, self.allocators)
        if self.dtype not in DTYPES:
            raise ConfigError(f"no dtype {self.dtype!r}: --dtype takes {', '.join(DTYPES)}")
        for option, value in (
            ("--block-size", self.block_size),
            ("--repeats", self.repeats),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--kv-memory", self.kv_memory),
            ("--max-model-len", self.max_model_len),
            ("--threads", self.threads),
        ):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(f"{option} must be at least 1, not {value}")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"--watermark must be from 0 to below 1, not {self.watermark}")
        if not self.silence_timeout_s > 0:
            raise ConfigError("the timeout of a silent method must be positive")

    def command_line(self) -> str:
        """The command that repeats this experiment: options that are not the defaults."""
        if self.command is not None:
            return self.command
        default = ExperimentSettings()
        words = ["pagelab", "compare"]
        for option, value, usual in (
            ("--model", self.model, default.model),
            ("--workload", ",".join(self.workloads), ",".join(default.workloads)),
            ("--methods", ",".join(self.methods), ",".join(default.methods)),
            ("--allocators", ",".join(self.allocators), ",".join(default.allocators)),
            ("--kv-memory", self.kv_memory, default.kv_memory),
            ("--block-size", self.block_size, default.block_size),
            ("--max-model-len", self.max_model_len, default.max_model_len),
            ("--dtype", self.dtype, default.dtype),
            ("--repeats", self.repeats, default.repeats),
            ("--seed", self.seed, default.seed),
            ("--threads", self.threads, default.threads),
            ("--watermark", self.watermark, default.watermark),
            (
                "--max-num-batched-tokens",
                self.max_num_batched_tokens,
                default.max_num_batched_tokens,
            ),
        ):
            if value != usual:
                words += [option, str(value)]
        return shlex.join(words)


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
            f"{max_model_len}: raise it, or choose another --workload"
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
