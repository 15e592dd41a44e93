"""`pagelab`: this project's engine, under the allocator that the job names."""

from __future__ import annotations

from pagelab.config import SchedulerConfig
from pagelab.engine.core import EngineCore
from pagelab.engine.llm import LLM
from pagelab.engine.replay import RealClock, demand_of, replay
from pagelab.errors import ConfigError
from pagelab.lab.methods.base import Method
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.results import KVCapacity, WorkloadRun
from pagelab.workloads import Workload


class Native(Method):
    """The engine's own step loop, without text: token ids in, token ids out."""

    core: EngineCore
    bytes_per_token: int

    def setup(self) -> KVCapacity:
        """Load model and pool; refuse a pool that could never hold a request of the job."""
        job = self.job
        if job.allocator is None:
            raise ConfigError("the method pagelab needs an allocator")
        llm = LLM(
            job.model,
            device=job.device,
            dtype=job.dtype,
            kv_memory=job.kv_memory,
            block_size=job.block_size,
            max_model_len=job.max_model_len,
            allocator=job.allocator,
            placement=job.placement,
            max_num_batched_tokens=job.max_num_batched_tokens,
            watermark=job.watermark,
            threads=job.threads,
            max_num_seqs=job.max_num_seqs or SchedulerConfig().max_num_seqs,
        )
        self.core = llm.core
        layout = llm.spec.kv_layout(llm.kv_dtype, job.block_size)
        self.bytes_per_token = layout.bytes_per_token
        memory = self.core.kv.config
        slots = memory.num_blocks * memory.block_size
        for workload in job.workloads:
            for request in workload.requests:
                if not self.core.kv.fits_ever(demand_of(request, job.max_model_len)):
                    raise MethodUnavailableError(
                        f"{job.allocator} cannot place {request.id} ({request.total_tokens} "
                        f"tokens, maximum length {job.max_model_len}) in a pool of {slots} slots: "
                        "raise --kv-memory or lower --max-model-len"
                    )
        return {
            "bytes": memory.num_blocks * layout.bytes_per_block,
            "slots": slots,
            "num_blocks": memory.num_blocks,
            "block_size": memory.block_size,
            "device": str(llm.device),
            "note": f"{memory.num_blocks} blocks of {memory.block_size} slots, "
            f"given out by {self.core.kv.allocator.name}"
            + (f", {memory.placement} placement" if self.core.kv.allocator.contiguous else ""),
        }

    def warm_up(self) -> None:
        """As of any method; what the prefix cache kept of it is dropped."""
        super().warm_up()
        self.core.kv.pool.drop_cached()

    def run(self, workload: Workload) -> WorkloadRun:
        """Add requests as they arrive, and step until all have ended."""
        return replay(
            self.core,
            workload,
            RealClock(),
            bytes_per_token=self.bytes_per_token,
            temperature=self.job.temperature,
            seed=self.job.seed,
            on_stage=self.reporter.stage,
            on_progress=self.reporter.progress,
        )
