"""Any mix of adding, cancelling, failing and stepping: right outputs, no leaks, a full ledger."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagelab.errors import RequestTooLongError
from pagelab.memory.allocators import ALLOCATORS, Demand
from pagelab.memory.ledger import take_ledger
from pagelab.scheduling.sequence import Request
from pagelab.types import FinishReason, SamplingParams
from tests.support.engines import outputs, run, toy_engine
from tests.support.toy_runner import generate

VOCAB = 97
EOS = 5


class EngineMachine(RuleBasedStateMachine):
    """The engine over the toy model against the toy model alone."""

    @initialize(
        num_blocks=st.integers(8, 20),
        block_size=st.sampled_from([1, 4]),
        allocator=st.sampled_from(["paged", "paged", *ALLOCATORS]),
        placement=st.sampled_from(["buddy", "first-fit"]),
        prefix_caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.2]),
        budget=st.sampled_from([1, 5, 64]),
        max_num_seqs=st.sampled_from([1, 3, 256]),
        ahead=st.integers(1, 3),
    )
    def start(self, num_blocks: int, block_size: int, **options: object) -> None:
        num_blocks = num_blocks * 4 // block_size
        self.core, self.runner = toy_engine(
            num_blocks,
            block_size,
            eos=(EOS,),
            **options,  # type: ignore[arg-type]
        )
        self.requests: list[Request] = []
        self.admitted_order: list[int] = []

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        max_tokens=st.integers(1, 14),
        n=st.sampled_from([1, 1, 3]),
        priority=st.integers(0, 2),
        ignore_eos=st.booleans(),
        known=st.one_of(st.none(), st.floats(0, 1)),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        ignore_eos: bool,
        known: float | None,
    ) -> None:
        end = None if known is None else max(1, round(known * max_tokens))
        params = SamplingParams(
            max_tokens=max_tokens, n=n, seed=len(self.requests), ignore_eos=ignore_eos
        )
        try:
            self.requests.append(
                self.core.add_request(prompt, params, priority=priority, output_tokens=end)
            )
        except RequestTooLongError:
            most = len(prompt) + max_tokens
            final = most if end is None else len(prompt) + end
            limit = self.core.scheduler.max_model_len
            demand = Demand(len(prompt), final, final, most, limit)
            assert most > limit or not self.core.kv.fits_ever(demand)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.core.cancel(data.draw(st.sampled_from(self.requests)).id)

    @rule()
    def fail_the_next_step(self) -> None:
        self.runner.fail_steps.add(len(self.runner.batches))

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            if self.core.has_unfinished_requests:
                self.core.step()

    @invariant()
    def ledger_sums_to_the_pool(self) -> None:
        self.core.scheduler.check_invariants()
        kv = self.core.kv
        entry = take_ledger(kv, self.core.scheduler.waiting_blocks)
        assert entry.pool == kv.config.num_blocks * kv.config.block_size
        assert min(entry) >= 0

    @invariant()
    def the_oldest_is_never_kept_out_by_others(self) -> None:
        scheduler = self.core.scheduler
        if scheduler.waiting and not scheduler.running and not self.core.kv.num_sequences:
            assert self.core.kv.pool.num_held == 0  # so that the next step admits it

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        run(self.core)
        assert self.core.kv.pool.num_held == 0, "blocks leaked"
        for request in self.requests:
            assert request.finished
            for sequence, tokens in zip(request.sequences, outputs(request), strict=True):
                seed = request.seed + sequence.id.sample
                expected = generate(
                    request.prompt_token_ids, request.final_output_tokens, seed, VOCAB
                )
                if not request.params.ignore_eos and EOS in expected:
                    expected = expected[: expected.index(EOS) + 1]
                if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    assert tokens == expected
                else:
                    assert tokens == expected[: len(tokens)]


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
