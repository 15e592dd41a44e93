"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter then runs the kernels; Triton reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pagelab.errors import ModelError
from pagelab.models.fetch import ModelSource, resolve


@pytest.fixture(scope="session")
def default_model() -> ModelSource:
    """The default model's file; skips where it cannot be fetched, except in CI.

    Tests that use it carry the marker `default_model`.
    """
    try:
        return resolve(None)
    except ModelError as error:
        if os.environ.get("CI"):
            pytest.fail(f"the default model is needed in CI: {error}")
        pytest.skip(str(error))
