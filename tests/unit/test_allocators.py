"""Every allocator against what its name promises, by brute force; and those of one's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.config import MemoryConfig
from pagelab.errors import ConfigError
from pagelab.memory.allocators import ALLOCATORS, Demand, make_allocator
from pagelab.memory.kv_manager import KVManager
from pagelab.types import RequestId, SequenceId


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    """Any state of any request that a server would accept."""
    max_model_len = draw(st.integers(2, 600))
    prompt = draw(st.integers(1, max_model_len - 1))
    most = draw(st.integers(prompt + 1, max_model_len))
    final = draw(st.integers(prompt + 1, most))
    now = draw(st.integers(1, final))
    return Demand(prompt, now, final, most, max_model_len)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least so much, by trying."""
    power = 1
    while power < least:
        power *= 2
    return power


@pytest.mark.parametrize("name", list(ALLOCATORS))
@given(demand=demands(), more=st.integers(0, 600))
def test_slots_hold_the_tokens_fit_the_model_and_never_shrink(
    name: str, demand: Demand, more: int
) -> None:
    allocator = make_allocator(name)
    now = allocator.slots(demand)
    assert demand.num_tokens <= now <= demand.max_model_len
    later = demand._replace(num_tokens=min(demand.final_tokens, demand.num_tokens + more))
    assert allocator.slots(later) >= now
    if not allocator.grows:  # what was taken at admission is enough to the end
        assert allocator.slots(later) == now
        assert now >= demand.final_tokens


@given(demands())
def test_each_allocator_is_what_it_is_called(demand: Demand) -> None:
    slots = {name: make_allocator(name).slots(demand) for name in ALLOCATORS}
    output = demand.final_tokens - demand.prompt_tokens
    assert slots["contiguous-max"] == demand.max_model_len
    assert slots["contiguous-oracle"] == demand.final_tokens
    assert slots["reserved-paged"] == demand.max_tokens
    assert slots["paged"] == demand.num_tokens
    rounded = demand.prompt_tokens + power_of_two(output)
    assert slots["contiguous-pow2"] == min(rounded, demand.max_model_len)
    assert slots["contiguous-pow2"] - demand.prompt_tokens < 2 * output


@given(demands())
def test_the_oracle_reserves_least_of_those_that_reserve_and_paging_holds_less(
    demand: Demand,
) -> None:
    slots = {name: make_allocator(name).slots(demand) for name in ALLOCATORS}
    reserving = [slots[name] for name in ALLOCATORS if not make_allocator(name).grows]
    assert slots["paged"] <= slots["contiguous-oracle"] == min(reserving)
    assert slots["contiguous-max"] == max(slots.values())


@given(demands(), st.integers(1, 64))
def test_paging_holds_the_fewest_blocks_that_hold_the_tokens(
    demand: Demand, block_size: int
) -> None:
    config = MemoryConfig(
        num_blocks=demand.max_model_len, block_size=block_size, max_model_len=demand.max_model_len
    )
    manager = KVManager(config)
    sequence = SequenceId(RequestId("a"), 0)
    assert manager.admit(sequence, demand, list(range(demand.num_tokens))) == 0
    fewest = math.ceil(demand.num_tokens / block_size)
    assert len(manager.block_ids(sequence)) == fewest
    assert fewest * block_size - demand.num_tokens < block_size  # the tail of the last block


# One's own

GOOD = """
class Mine:
    name, contiguous, grows = "mine", False, True
    def slots(self, demand):
        return demand.num_tokens
"""


def own(tmp_path: Path, text: str, name: str = "Mine") -> str:
    file = tmp_path / "mine.py"
    file.write_text(text)
    return f"{file}:{name}"


def test_ones_own_is_loaded_from_a_file_or_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_allocator(own(tmp_path, GOOD))
    assert (made.name, made.contiguous, made.grows) == ("mine", False, True)
    assert made.slots(Demand(1, 7, 9, 9, 9)) == 7
    (tmp_path / "a_module_of_mine.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)  # as `python -m` would find it
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert make_allocator("a_module_of_mine:Mine").name == "mine"


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (GOOD, "Nobody", "there is no class 'Nobody' in that module"),
        ("Mine = 3", "Mine", "there is no class 'Mine'"),
        ("import nothing_like_it", "Mine", "cannot be imported: ModuleNotFoundError"),
        ("class Mine(", "Mine", "cannot be imported: SyntaxError"),
        ("1 / 0", "Mine", "cannot be imported: ZeroDivisionError"),
        (
            "class Mine:\n    def __init__(self, size): pass",
            "Mine",
            "cannot be made without arguments: TypeError",
        ),
        (GOOD.replace('"mine"', '""'), "Mine", "needs a `name`"),
        (GOOD.replace('"mine"', "3"), "Mine", "needs a `name`"),
        (GOOD.replace('"mine"', '"paged"'), "Mine", "its name 'paged' is taken"),
        (GOOD.replace("False, True", "0, True"), "Mine", "needs `contiguous`, True or False"),
        (GOOD.replace("False, True", "False, None"), "Mine", "needs `grows`, True or False"),
        (GOOD.replace("False, True", "True, True"), "Mine", "a contiguous range cannot grow"),
        (GOOD.replace("def slots", "def slot"), "Mine", r"needs a method `slots\(demand\)`"),
    ],
)
def test_what_is_no_allocator_is_refused_with_the_reason(
    tmp_path: Path, text: str, name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_allocator(own(tmp_path, text, name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pages", "choose one of contiguous-max, .* or name a class of your own"),
        ("/no/such/file.py:Mine", "cannot be imported: FileNotFoundError"),
        ("no.such.module:Mine", "cannot be imported: ModuleNotFoundError"),
        (":Mine", "cannot be imported"),
    ],
)
def test_what_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_allocator(name)


def test_slots_that_do_not_hold_the_tokens_are_refused_when_they_are_asked(tmp_path: Path) -> None:
    allocator = make_allocator(own(tmp_path, GOOD.replace("num_tokens", "num_tokens - 1")))
    manager = KVManager(MemoryConfig(num_blocks=4, block_size=4), allocator)
    with pytest.raises(ConfigError, match="gave 4, fewer than the 5 tokens"):
        manager.admit(SequenceId(RequestId("a"), 0), Demand(5, 5, 9, 9, 9), [1] * 5)
