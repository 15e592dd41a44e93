"""transformers' model for the methods that use it: the same weights as the engine's."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.utils import logging as transformers_logging

from pagelab.execution.loading import DeviceConfig, resolve_device
from pagelab.lab.methods.base import Method
from pagelab.models.fetch import resolve
from pagelab.models.hf_export import to_transformers
from pagelab.models.registry import load_spec


class TransformersMethod(Method):
    """A method that calls `generate()` of transformers' model."""

    model: Any
    device: torch.device
    bytes_per_token: int
    pool: int  # slots of the KV budget

    def load_model(self) -> None:
        """Load weights, and set what all runs share: threads, sampling, no end of sequence.

        Raises:
            ConfigError: a device that is not there.
        """
        self.device, _ = resolve_device(DeviceConfig(device=self.job.device))
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module="transformers")
        torch.set_num_threads(self.job.threads)
        source = resolve(self.job.model)
        spec = load_spec(source)
        self.bytes_per_token = spec.kv_layout(self.job.dtype, 1).bytes_per_token
        self.pool = self.job.kv_memory // self.bytes_per_token
        self.model = to_transformers(source, spec, dtype=self.job.dtype).eval()
        self.model = self.model.to(self.device)
        config = self.model.generation_config
        config.eos_token_id = None  # nothing ends early, and no token is suppressed for it
        config.pad_token_id = 0
        config.max_length = None
        if self.job.temperature > 0:  # the whole distribution, at this temperature
            config.do_sample = True
            config.temperature, config.top_k, config.top_p = self.job.temperature, 0, 1.0
        else:
            config.do_sample = False
            config.temperature = config.top_p = config.top_k = None
        self.seed()

    def seed(self) -> None:
        """Start the random numbers anew: a run's samples do not depend on what ran before it."""
        torch.manual_seed(self.job.seed)

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        on_token: OnToken,
        **options: Any,
    ) -> list[list[int]]:
        """Call `generate()` on a left-padded batch; returns the new tokens of every row.

        All rows get `max_new_tokens`.
        """
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor(padded, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=max_new_tokens,
                stopping_criteria=[on_token],
                **options,
            )
        new: list[list[int]] = output[:, longest:].tolist()
        return new


class OnToken(StoppingCriteria):  # type: ignore[misc]
    """Notes the time at which each token of a batch was there; stops nothing.

    Subclasses do more in `token`, which is called with the time and how many tokens each row
    has by then. `generate()` asks its stopping criteria once after every token.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.times: list[float] = []

    def token(self, t: float, count: int) -> None:
        """A token was sampled for every row at `t` seconds of the workload; the count-th one."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:  # the token is there when the GPU has made it
            torch.cuda.synchronize(input_ids.device)
        now = time.perf_counter() - self.started
        self.times.append(now)
        self.token(now, len(self.times))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
