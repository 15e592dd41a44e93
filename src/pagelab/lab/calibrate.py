"""The prices of this machine's steps, fitted to a short run of the real engine.

::

    designed loads ──▶ EngineCore + ModelRunner ──▶ (features, seconds) of every step
                                                        │ four of five     │ every fifth
                                                        ▼                  ▼
                                             least squares, no price   error where it
                                             negative ──▶ CostModel    was not fitted
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pagelab.models.fetch import model_cache
from pagelab.models.shape_source import load_shape
from pagelab.scheduling.batch import Batch, StepResult
from pagelab.sim.cost_model import KNOTS, CostModel, StepFeatures, features_of, relative_errors
from pagelab.telemetry import available_cores, describe_environment
from pagelab.types import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from pagelab.engine.core import EngineCore, Runner


class Load(NamedTuple):
    """Requests that start together, or one every so many steps; `prompt_tokens` is their mean.

    Several prompts have lengths from 0.3 to 1.7 times the mean: attention works on groups of
    similar length, and prices fitted to equal lengths were a sixth too low for real loads.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    every: int = 0

    def prompt_length(self, index: int) -> int:
        """Tokens of one of its prompts."""
        if self.requests == 1:
            return self.prompt_tokens
        return max(2, round(self.prompt_tokens * (0.3 + 1.4 * (index * _GOLDEN % 1.0))))

    @property
    def longest(self) -> int:
        """Tokens that its longest request may reach."""
        spread = 1 if self.requests == 1 else 1.7
        return round(self.prompt_tokens * spread) + self.output_tokens + 1


_GOLDEN = 0.6180339887  # its multiples, modulo 1, are spread evenly

LOADS = (
    # decoding: from one sequence to many, short and long contexts
    Load(1, 16, 14),
    Load(1, 120, 10),
    Load(1, 900, 10),
    Load(2, 128, 12),
    Load(4, 32, 12),
    Load(4, 300, 12),
    Load(8, 16, 12),
    Load(8, 80, 12),
    Load(8, 250, 10),
    Load(12, 90, 10),
    Load(16, 40, 12),
    Load(16, 150, 10),
    Load(24, 24, 12),
    Load(24, 70, 10),
    Load(32, 16, 12),
    Load(32, 50, 10),
    # prompts: from a few tokens to a whole step's budget, alone and among others' decoding
    *(Load(1, tokens, 1) for tokens in (4, 8, 12, 24, 48, 96, 160, 240, 360, 500)),
    Load(3, 60, 1),
    Load(3, 150, 1),
    Load(6, 80, 1),
    Load(10, 50, 1),
    Load(14, 35, 1),
    Load(24, 20, 1),
    Load(10, 70, 24, every=2),
    Load(14, 30, 30, every=2),
    Load(8, 160, 24, every=4),
)
"""What calibration runs: about a minute of SmolLM2-135M on two cores."""

HOLD_OUT = 5  # every so many steps, one is not fitted
OUTLIER = 0.4  # a step this far off the first fit was disturbed by something else


class Measured(NamedTuple):
    """The steps of the calibration run."""

    features: list[StepFeatures]
    seconds: list[float]


def calibration_path(model: str, dtype: str) -> Path:
    """Where a model's calibration on this machine is kept; `model` is its shape's name."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{model}-{dtype}")
    return model_cache().parent / "calibrations" / f"{name}.json"


def calibrate(
    model: str | None = None,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CostModel:
    """Run the designed loads on the real engine and fit the prices.

    Args:
        model: None for the default model; a folder, a `.gguf` file or a hub id.
        dtype: of the engine.
        threads: CPU threads; None: the physical cores given to this process.
        on_progress: called with the loads done and all of them.

    Raises:
        ModelError, ConfigError: as `LLM`.
    """
    from pagelab.engine.llm import LLM  # torch

    threads = threads or available_cores()
    llm = LLM(model, device="cpu", dtype=dtype, kv_memory="512MiB", threads=threads)
    longest = llm.spec.max_position
    loads = [load for load in LOADS if load.longest <= longest]
    run_load(llm.core, Load(4, 8, 4), 0)  # what is slow the first time
    measured = Measured([], [])
    for number, load in enumerate(loads, 1):
        steps = run_load(llm.core, load, number)
        measured.features.extend(steps.features)
        measured.seconds.extend(steps.seconds)
        if on_progress is not None:
            on_progress(number, len(loads))
    environment = describe_environment()
    return fit(
        measured,
        name=f"calibrated: {llm.source.name}, {llm.dtype}, {threads} threads",
        provenance={
            "model": load_shape(model).name,
            "dtype": llm.dtype,
            "threads": threads,
            "cpu": environment["cpu"]["model"],
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )


def run_load(core: EngineCore, load: Load, number: int) -> Measured:
    """Run one load; every step's features and how long it took, scheduling included."""
    runner = core.runner
    measured = Measured([], [])
    core.runner = _Watched(runner, measured.features)
    try:
        waiting, step = load.requests, 0
        while waiting or core.has_unfinished_requests:
            if waiting and (load.every == 0 or step % load.every == 0):
                for _ in range(waiting if load.every == 0 else 1):
                    _add(core, load, number, waiting)
                    waiting -= 1
            started = time.perf_counter()
            core.step()
            measured.seconds.append(time.perf_counter() - started)
            step += 1
    finally:
        core.runner = runner
    assert len(measured.features) == len(measured.seconds)
    return measured


class _Watched:
    """A runner that notes what each step does."""

    def __init__(self, runner: Runner, features: list[StepFeatures]) -> None:
        self._runner, self._features = runner, features

    def submit(self, batch: Batch) -> Any:
        self._features.append(features_of(batch))
        return self._runner.submit(batch)

    def collect(self, handle: Any) -> StepResult:
        return self._runner.collect(handle)


def _add(core: EngineCore, load: Load, number: int, index: int) -> None:
    first = 1 + 7919 * number + 104729 * index  # no two prompts begin alike: no prefix is found
    prompt = [(first + 31 * i) % core.vocab_size for i in range(load.prompt_length(index))]
    params = SamplingParams(max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True)
    core.add_request(prompt, params)


def fit(
    measured: Measured, *, name: str = "calibrated", provenance: dict[str, Any] | None = None
) -> CostModel:
    """Prices by least squares of the relative error, none negative.

    The error of the steps that were held out goes into `provenance`.
    """
    train = [i for i in range(len(measured.seconds)) if i % HOLD_OUT]
    model = _solve(measured, train, name)
    errors = relative_errors(model, measured.features, measured.seconds)
    kept = [i for i in train if abs(errors[i]) <= OUTLIER] or train
    model = _solve(measured, kept, name)
    held = [i for i in range(len(measured.seconds)) if i % HOLD_OUT == 0]
    left = [abs(error) for error in relative_errors(model, *_at(measured, held))]
    total = sum(measured.seconds[i] for i in held)
    predicted = sum(model.seconds(measured.features[i]) for i in held)
    notes = {
        "steps": len(measured.seconds),
        "steps_left_out_as_disturbed": len(train) - len(kept),
        "held_out_steps": len(held),
        "held_out_mean_relative_error": round(sum(left) / len(left), 4) if left else None,
        "held_out_total_ratio": round(predicted / total, 4) if total else None,
    }
    return replace(model, provenance=(provenance or {}) | notes)


def _at(measured: Measured, indices: Sequence[int]) -> Measured:
    return Measured([measured.features[i] for i in indices], [measured.seconds[i] for i in indices])


def _solve(measured: Measured, indices: Sequence[int], name: str) -> CostModel:
    import numpy as np

    steps, seconds = _at(measured, indices)
    rows = [
        [
            1.0,
            *(max(0, min(s.tokens, end) - knot) for knot, end in pairwise((*KNOTS, 1 << 40))),
            s.sequences,
            s.samples,
            s.kv_tokens,
            s.pairs,
        ]
        for s in steps
    ]
    times = np.asarray(seconds)
    design = np.asarray(rows, dtype=np.float64) / times[:, None]
    prices = non_negative_least_squares(design, np.ones(len(times)))
    count = len(KNOTS)
    return CostModel(
        name=name,
        constant=float(prices[0]),
        knots=tuple(float(knot) for knot in KNOTS),
        slopes=tuple(float(price) for price in prices[1 : count + 1]),
        per_sequence=float(prices[count + 1]),
        per_sample=float(prices[count + 2]),
        per_kv_token=float(prices[count + 3]),
        per_pair=float(prices[count + 4]),
    )


def non_negative_least_squares(
    design: np.ndarray, target: np.ndarray, sweeps: int = 20_000
) -> np.ndarray:
    """x ≥ 0 that minimizes |design · x − target|², by coordinate descent.

    Args:
        design: [rows, columns].
        target: [rows].
        sweeps: over all columns, at most; it ends when nothing moves any more.

    Returns:
        [columns].
    """
    import numpy as np

    scale = np.sqrt((design**2).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = design / scale
    gram, right = scaled.T @ scaled, scaled.T @ target
    x = np.zeros(design.shape[1])
    for _ in range(sweeps):
        largest = 0.0
        for j in range(len(x)):
            if gram[j, j] == 0:
                continue
            new = max(0.0, x[j] + (right[j] - gram[j] @ x) / gram[j, j])
            largest = max(largest, abs(new - x[j]))
            x[j] = new
        if largest < 1e-10:
            break
    result: np.ndarray = x / scale
    return result
