"""A run is not stopped for a full collection, and Python's settings are put back after it."""

from __future__ import annotations

import gc

import pytest

from pagelab.engine.garbage import no_full_collections


def test_full_collections_wait_until_the_end() -> None:
    before = gc.get_threshold()
    full = gc.get_stats()[2]["collections"]
    with no_full_collections():
        kept = [[i] for i in range(400_000)]  # many times what would lead to a full collection
        assert len(kept) == 400_000
        assert gc.get_stats()[2]["collections"] == full
        assert gc.get_stats()[1]["collections"] > 0
    assert gc.get_threshold() == before


def failing() -> None:
    with no_full_collections():
        raise KeyError


def test_python_s_settings_come_back_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError):
        failing()
    assert gc.get_threshold() == before
